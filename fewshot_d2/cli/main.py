"""The command ``fewshot-d2``: show it one, find all."""

import argparse
import io
import sys
from collections.abc import Sequence

from ..decoding import printable
from . import check, doctor, find, supports


def build_parser() -> argparse.ArgumentParser:
    """All subcommands."""
    parser = argparse.ArgumentParser(prog="fewshot-d2", description=__doc__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (find, supports, check, doctor):
        module.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 = done, 1 = done and something is wrong, 2 = the input cannot be used."""
    for stream in (sys.stdout, sys.stderr):
        # Names of files may have bytes that no terminal can show.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(arguments)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"fewshot-d2: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fewshot-d2: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
