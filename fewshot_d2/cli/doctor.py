"""``fewshot-d2 doctor``: what is installed, and how to mend what is not."""

import argparse

from fewshot_d2_doctor import add_arguments, examine, report


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Arguments of the subcommand."""
    parser = subparsers.add_parser("doctor", help="check the installation", description=__doc__)
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine and print; 1 where something must be mended."""
    return report(examine(all_data_sets=args.data_sets))
