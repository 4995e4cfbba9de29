#!/usr/bin/env python3
"""Turn RepMet's released benchmark files into a COCO json and a benchmark plan; nothing in them is executed."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fewshot_d2.data.repmet_release import convert_release


def main(argv: Sequence[str] | None = None) -> None:
    """Convert; bad input ends the tool with one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--roidb", type=Path, required=True, help="voc_inloc_roidb.pkl")
    parser.add_argument(
        "--episodes", type=Path, required=True, help="an episode file, .pkl or .npz"
    )
    parser.add_argument("--shots", type=int, required=True, help="as in the episode file's name")
    parser.add_argument("--prefix", default="", help="what is cut off the paths of images")
    parser.add_argument("--dataset", default="repmet_release", help="name of the data set")
    parser.add_argument("--output", type=Path, required=True, help="folder of json and plan")
    args = parser.parse_args(argv)
    try:
        plan = convert_release(
            args.roidb,
            args.episodes,
            args.output,
            dataset=args.dataset,
            prefix=args.prefix,
            shots=args.shots,
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"convert_repmet_episodes: {error}") from error
    without = sum(not ids for episode in plan.episodes for ids in episode.supports)
    print(f"{args.output / 'instances.json'}: data set {plan.dataset!r}")
    print(
        f"{args.output / plan.file_name}  sha256 {plan.sha256}  {len(plan.episodes)} episodes of "
        f"{plan.ways} classes, {len(plan.class_ids)} classes, {without} without an example"
    )


if __name__ == "__main__":
    main()
