"""``fewshot-d2 support``: make, change and look at support-set files."""

import argparse
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ..decoding import printable
from ..files import atomic_path
from ..inference.feature_store import save_keeping_features
from ..inference.localization import METHODS, localize_supports, rows_of
from ..inference.support_editing import (
    SPECIFICATION,
    merged,
    renamed,
    support_set_of,
    with_negatives,
    without,
)
from ..structures import SupportSet
from ..visualization.contact_sheet import contact_sheet
from .common import add_model_arguments, build_predictor, table


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Arguments of the subcommands."""
    parser = subparsers.add_parser("support", help="support-set files", description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, help_text, run in (
        ("create", "a new file from examples", create),
        ("add", "more examples, of old or new classes", add),
    ):
        action = _action(actions, name, help_text, run)
        action.add_argument("support", nargs="*", metavar="SPEC", help=SPECIFICATION)
        action.add_argument(
            "--negative",
            action="append",
            default=[],
            metavar="SPEC",
            help="not to be found; repeat",
        )
    action = _action(actions, "remove", "a class, or one of its examples", remove)
    action.add_argument("name", metavar="CLASS")
    action.add_argument("--example", type=int, metavar="N", help="number on the contact sheet")
    action = _action(actions, "rename", "a class", rename)
    action.add_argument("old", metavar="CLASS")
    action.add_argument("new", metavar="NAME")
    action = _action(actions, "merge", "several files into a new one", merge)
    action.add_argument("parts", nargs="+", metavar="PART")
    action = _action(actions, "inspect", "list the examples", inspect)
    action.add_argument("--sheet", metavar="PNG", help="write a contact sheet")
    action = _action(actions, "localize", "boxes for examples that are whole images", localize)
    action.add_argument("--output", metavar="FILE", help="new file; default: change FILE")
    action.add_argument(
        "--method",
        choices=METHODS,
        default=METHODS[0],
        help="found by the other examples of a class (SILCO), or what all its images have in common",
    )
    action.add_argument(
        "--min-score", type=float, default=0.0, help="what scores less is not found"
    )
    add_model_arguments(action)
    action = _action(actions, "encode", "keep a model's features in the file", encode)
    add_model_arguments(action)


def _action(
    actions: argparse._SubParsersAction,
    name: str,
    help_text: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    action = actions.add_parser(name, help=help_text, description=f"{help_text}.")
    action.add_argument("file", metavar="FILE", help="support-set file (.zip)")
    action.set_defaults(run=run)
    return action


def create(args: argparse.Namespace) -> int:
    """Write a new file; an old one is left alone."""
    _check_new(args.file)
    if not args.support:
        raise ValueError(f"a support set must have at least one example {SPECIFICATION}, got none")
    return _save(args.file, with_negatives(support_set_of(args.support), args.negative))


def add(args: argparse.Namespace) -> int:
    """Add examples."""
    sets = [SupportSet.load(args.file)]
    if args.support:
        sets.append(support_set_of(args.support))
    return _save(args.file, with_negatives(merged(sets), args.negative))


def remove(args: argparse.Namespace) -> int:
    """Remove a class or an example."""
    return _save(args.file, without(SupportSet.load(args.file), args.name, args.example))


def rename(args: argparse.Namespace) -> int:
    """Rename a class."""
    return _save(args.file, renamed(SupportSet.load(args.file), args.old, args.new))


def merge(args: argparse.Namespace) -> int:
    """Join files into a new one."""
    _check_new(args.file)
    return _save(args.file, merged([SupportSet.load(part) for part in args.parts]))


def inspect(args: argparse.Namespace) -> int:
    """Print what is in a file, and draw it."""
    if args.sheet and Path(args.sheet).suffix.lower() != ".png":
        raise ValueError(
            f"--sheet must be a file name that ends in .png, got {printable(args.sheet)}"
        )
    support_set = SupportSet.load(args.file)
    _print(support_set)
    if args.sheet:
        with atomic_path(args.sheet) as temporary:
            Image.fromarray(contact_sheet(support_set)).save(temporary, "PNG")
        print(f"contact sheet: {args.sheet}")
    return 0


def localize(args: argparse.Namespace) -> int:
    """Find whole-image examples in their images; 1 = some were not found and are as they were."""
    if args.output:
        _check_new(args.output)
    support_set = SupportSet.load(args.file)
    support_set, done = localize_supports(
        build_predictor(args), support_set, method=args.method, min_score=args.min_score
    )
    save_keeping_features(args.output or args.file, support_set)
    print(table(rows_of(done), ["class", "example", "x,y,w,h", "score"]))
    return int(any(shot.box is None for shot in done))


def encode(args: argparse.Namespace) -> int:
    """Encode with a model and keep the features."""
    support_set = SupportSet.load(args.file)
    predictor = build_predictor(args)
    predictor.save_support(args.file, support_set)
    print(f"features of model {predictor.sha256[:12]} are in {args.file}")
    return 0


def _check_new(file: str) -> None:
    if Path(file).exists():
        raise ValueError(f"the new file must not exist yet, got {printable(file)}")


def _save(file: str, support_set: SupportSet) -> int:
    """Write and print; features stay as long as the examples are the same."""
    save_keeping_features(file, support_set)
    _print(support_set)
    return 0


def _print(support_set: SupportSet) -> None:
    rows = []
    for class_id, name, shots in zip(
        support_set.class_ids, support_set.class_names, support_set.examples, strict=True
    ):
        negatives = sum(shot.negative for shot in shots)
        masks = sum(shot.mask is not None for shot in shots)
        boxes = sum(shot.box is not None for shot in shots) - masks
        whole = len(shots) - masks - boxes
        rows.append((class_id, name, len(shots) - negatives, negatives, boxes, masks, whole))
    print(table(rows, ["id", "class", "examples", "negative", "boxes", "masks", "whole images"]))
