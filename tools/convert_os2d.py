#!/usr/bin/env python3
"""Turn a checkpoint of the original OS2D release, or of weakalign, into one that MODEL.WEIGHTS takes; runs no code."""

import argparse
from collections.abc import Sequence

from fewshot_d2.systems.os2d.release import convert_file


def main(argv: Sequence[str] | None = None) -> None:
    """Convert; bad input ends the tool with one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="of the original release or of weakalign, a .pth file")
    parser.add_argument("output", help="the file to write, .pth")
    args = parser.parse_args(argv)
    try:
        number = convert_file(args.checkpoint, args.output)
    except (ValueError, OSError) as error:
        raise SystemExit(f"convert_os2d: {error}") from error
    print(f"{args.output}: {number} tensors")


if __name__ == "__main__":
    main()
