"""``fewshot-d2 check``: are the examples any good, and which score separates a class from the rest?"""

import argparse

from ..files import write_json
from ..inference.exemplar_check import check_examples
from ..inference.sources import Pictures
from .common import (
    add_model_arguments,
    add_support_arguments,
    build_predictor,
    read_supports,
    table,
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Arguments of the subcommand."""
    parser = subparsers.add_parser("check", help="test the examples", description=__doc__)
    add_support_arguments(parser)
    parser.add_argument(
        "--images", nargs="+", default=[], help="unlabelled pictures, for better thresholds"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="where thresholds go, for `fewshot-d2 find --thresholds`"
    )
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check and print; 1 where an example is no good."""
    supports = read_supports(args)
    pictures = Pictures(args.images) if args.images else []
    checks = check_examples(
        build_predictor(args),
        supports,
        (picture.name if picture.pixels is None else picture.pixels for picture in pictures),
    )
    print(
        table(
            [
                (
                    *(check.name, shot.number, shot.self_score, shot.other_score),
                    *(shot.confusable or "none", shot.confusable_score, shot.verdict),
                )
                for check in checks
                for shot in check.shots
            ],
            ["class", "example", "by itself", "by the others", "most like", "score", "verdict"],
        )
    )
    print()
    print(table([(c.name, c.threshold) for c in checks], ["class", "suggested threshold"]))
    if args.output:
        write_json(args.output, {"thresholds": {c.name: c.threshold for c in checks}}, indent=1)
    return int(any(shot.verdict != "good" for check in checks for shot in check.shots))
