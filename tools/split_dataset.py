#!/usr/bin/env python3
"""Split a COCO or LVIS json into parts that share no image, for data that comes without a test set.

Examples::

    python tools/split_dataset.py --json coco482/instances.json --parts train test=100 --output coco482
    python tools/split_dataset.py --json own.json --parts train val=500 test=500 --seed 3 --output own_parts

Writes one json a part, named as the file with the part's name added. Paths are below DETECTRON2_DATASETS if relative.
"""

import argparse
from collections.abc import Sequence

from fewshot_d2.data.coco_json import read_json
from fewshot_d2.data.dataset_parts import split_images
from fewshot_d2.files import canonical_sha256, dataset_path, write_json


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", required=True, help="of the whole data set")
    parser.add_argument(
        "--parts", nargs="+", required=True, help="name=number of images; one name alone: the rest"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, help="folder of the new files")
    return parser.parse_args(argv)


def part_sizes(texts: Sequence[str]) -> dict[str, int | None]:
    """Read ``name=number`` and ``name``.

    Raises:
        ValueError: a text is neither, or a name is there twice.
    """
    sizes: dict[str, int | None] = {}
    for text in texts:
        name, is_given, number = text.partition("=")
        if not name.isidentifier() or name in sizes or is_given and not number.isdecimal():
            raise ValueError(
                f"--parts must be name=number or name, each name once, got {' '.join(texts)}"
            )
        sizes[name] = int(number) if is_given else None
    return sizes


def split_dataset(args: argparse.Namespace) -> None:
    """Split, save and print."""
    path = dataset_path(args.json)
    parts = split_images(read_json(path), part_sizes(args.parts), args.seed)
    for name, content in parts.items():
        output = dataset_path(args.output) / f"{path.stem}_{name}.json"
        write_json(output, content)
        size = f"{len(content['images'])} images, {len(content['annotations'])} annotations"
        print(f"{output}  sha256 {canonical_sha256(content)}  {size}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool; bad input ends it with one line."""
    try:
        split_dataset(parse_args(argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"split_dataset: {error}") from error


if __name__ == "__main__":
    main()
