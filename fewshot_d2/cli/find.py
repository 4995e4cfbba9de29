"""``fewshot-d2 find``: search pictures for what is on the examples."""

import argparse
import contextlib
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..inference.find import Summary, find
from ..inference.result_folder import ResultFolder
from ..inference.sources import Pictures
from .common import (
    add_model_arguments,
    add_support_arguments,
    build_predictor,
    read_supports,
    read_thresholds,
    table,
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Arguments of the subcommand."""
    parser = subparsers.add_parser("find", help="search pictures", description=__doc__)
    add_support_arguments(parser)
    parser.add_argument(
        "--images", nargs="+", required=True, help="folders, files, patterns, videos"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="least score that is drawn and counted"
    )
    parser.add_argument("--thresholds", metavar="FILE", help="of `fewshot-d2 check --output`")
    parser.add_argument("--every", type=int, default=1, help="of a video, one of so many frames")
    parser.add_argument("--no-pictures", action="store_true", help="do not draw")
    parser.add_argument("--no-crops", action="store_true", help="do not cut out what is found")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search, write, and print a table."""
    supports = read_supports(args)
    thresholds = read_thresholds(args.thresholds, args.threshold, supports.class_names)
    pictures = Pictures(args.images, every=args.every)
    total = len(pictures)
    predictor = build_predictor(args)
    folder = ResultFolder(
        args.output,
        class_ids=supports.class_ids,
        class_names=supports.class_names,
        thresholds=thresholds,
        with_pictures=not args.no_pictures,
        with_crops=not args.no_crops,
    )
    predictor.save_support(folder.folder / "supports.zip", supports, stored_in=args.supports)
    start = time.perf_counter()
    bar = functools.partial(tqdm, total=total, unit=" images", dynamic_ncols=True)
    with _stopped_by_interrupt() as is_stopped:
        progress = functools.partial(_until, is_stopped, bar)
        summary = find(predictor, pictures, folder, progress=progress)
    print_summary(summary, supports.class_names, folder.folder, time.perf_counter() - start)
    if is_stopped():
        done = summary.num_images + summary.num_skipped
        print(f"interrupted: only {done} of {total} images were searched, results are of these")
        return 130
    return 0 if summary.num_images else 1


def _until(
    is_stopped: Callable[[], bool],
    bar: Callable[[Iterator[Any]], Iterable[Any]],
    items: Iterator[Any],
) -> Iterator[Any]:
    """``bar`` up to the item at which it is stopped."""
    with contextlib.closing(items):
        for item in bar(items):
            yield item
            if is_stopped():
                return


@contextlib.contextmanager
def _stopped_by_interrupt() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C only asks to stop, so that what was found is written; the second one is as usual."""
    asked = threading.Event()

    def stop(*_: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # Signals are the main thread's alone.
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, stop) if is_main else None
    try:
        yield asked.is_set
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)


def print_summary(summary: Summary, class_names: list[str], output: Path, seconds: float) -> None:
    """A row a class, and what was skipped."""
    rows = zip(class_names, summary.counts, summary.images_with, strict=True)
    print(table(rows, ["class", "found", "images with it"]))
    print(
        f"{summary.num_images} images in {seconds:.1f} s "
        f"({seconds / max(summary.num_images, 1):.3f} s each); results in {output}"
    )
    if summary.num_skipped:
        print(f"{summary.num_skipped} skipped, see {output / 'skipped.csv'}:")
        for reason in summary.skipped:
            print(f"  {reason}")
