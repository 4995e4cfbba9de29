"""``fewshot-d2 find``: search pictures for what is on the examples."""

import argparse
import functools
import time
from pathlib import Path

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
    predictor = build_predictor(args)
    folder = ResultFolder(
        args.output,
        class_ids=supports.class_ids,
        class_names=supports.class_names,
        thresholds=thresholds,
        with_pictures=not args.no_pictures,
        with_crops=not args.no_crops,
    )
    predictor.set_support(supports, stored_in=args.supports)
    predictor.save_support(folder.folder / "supports.zip", supports)
    start = time.perf_counter()
    bar = functools.partial(tqdm, total=len(pictures), unit=" images", dynamic_ncols=True)
    summary = find(predictor, pictures, folder, progress=bar)
    print_summary(summary, supports.class_names, folder.folder, time.perf_counter() - start)
    return 0 if summary.num_images else 1


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
