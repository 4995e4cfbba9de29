#!/usr/bin/env python3
"""Write evaluation plans, one a run, or with --ways or --tuples benchmark plans, one a number of shots, with SHA-256.

Examples::

    python tools/make_episodes.py --dataset coco482 --json coco482/instances.json \
        --images coco482/images --split every_4th:1 --side novel --output plans
    python tools/make_episodes.py --config-file own.yaml --dataset own_test --support-dataset own_train \
        --fixed-supports --protocol open --shots 10 --runs 1 --split every_4th:1 --output plans
    python tools/make_episodes.py ... --ways 5 --shots 1 5 10 --queries-per-class 10 --episodes 500 --output plans
    python tools/make_episodes.py --dataset cl_voc07_test --split part:1/2 --no-difficult --min-area 0.001 \
        --max-boxes 30 --tuples 5000 --shots 1 3 5 7 9 --output plans
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog

from fewshot_d2 import load_config
from fewshot_d2.data.benchmark_plans import BenchmarkPlan, build_benchmark_plans
from fewshot_d2.data.coco_json import register_instances
from fewshot_d2.data.ground_truth import GroundTruthFilter
from fewshot_d2.data.loaders import build_plans, register_from_config
from fewshot_d2.data.plans import PROTOCOLS, EvaluationPlan
from fewshot_d2.data.splits import SIDES
from fewshot_d2.data.tuple_plans import TuplePlan, build_tuple_plans

# Options that plans of one kind alone have.
_ONLY = {
    **dict.fromkeys(
        ("runs", "protocol", "max_images", "fixed_supports", "no_foreign_images"),
        "without --ways and --tuples",
    ),
    **dict.fromkeys(("queries_per_class", "episodes"), "with --ways"),
    **dict.fromkeys(("no_difficult", "min_area", "max_boxes"), "with --tuples"),
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dataset", required=True, help="name of the data set that is searched")
    parser.add_argument("--json", help="register --dataset from this COCO or LVIS json")
    parser.add_argument("--images", help="image folder of --json (both below DETECTRON2_DATASETS)")
    parser.add_argument("--config-file", help="register the data sets of its FEWSHOT.REGISTER")
    parser.add_argument(
        "--support-dataset", help="draw supports from this one (default: --dataset)"
    )
    parser.add_argument(
        "--split", default="all", help="e.g. every_4th:1, novel:dog,cat, file:x.json"
    )
    parser.add_argument("--side", choices=SIDES, default="novel")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="present")
    parser.add_argument("--shots", type=int, nargs="+", default=[1], help="a plan for each")
    parser.add_argument("--seed", type=int, help="default: 0, of benchmark plans 9001")
    parser.add_argument("--runs", type=int, default=5, help="number of plans, runs 0, 1, ...")
    parser.add_argument("--max-images", type=int, default=0, help="0 = all")
    parser.add_argument(
        "--fixed-supports",
        action="store_true",
        help="the same supports in all episodes of a plan; --support-dataset must share no image",
    )
    parser.add_argument(
        "--no-foreign-images",
        action="store_true",
        help="with --protocol open: leave out images that hold other classes alone",
    )
    parser.add_argument("--ways", type=int, help="classes an episode: write benchmark plans")
    parser.add_argument("--queries-per-class", type=int, default=10, help="with --ways")
    parser.add_argument("--episodes", type=int, default=500, help="with --ways")
    parser.add_argument(
        "--tuples", type=int, help="write plans of so many tuples: a class, images of it, a query"
    )
    parser.add_argument("--no-difficult", action="store_true", help="with --tuples")
    parser.add_argument("--min-area", type=float, default=0.0, help="of the image; with --tuples")
    parser.add_argument("--max-boxes", type=int, default=0, help="of a class; with --tuples")
    parser.add_argument("--output", type=Path, required=True, help="folder of the plans")
    args = parser.parse_args(argv)
    if (args.json is None) != (args.images is None):
        parser.error("--json and --images must be given together")
    if args.tuples is not None and args.ways is not None:
        parser.error("--tuples are of one class: --ways must be left out")
    kind = "with --ways" if args.ways is not None else "without --ways and --tuples"
    kind = "with --tuples" if args.tuples is not None else kind
    for name, of_kind in _ONLY.items():
        if of_kind != kind and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is for plans {of_kind}")
    if args.seed is None:
        args.seed = 0 if args.ways is None and args.tuples is None else 9001
    if args.runs < 1:
        parser.error(f"--runs must be at least 1, got {args.runs}")
    return args


def write_plans(args: argparse.Namespace) -> None:
    """Make, save and print the plans."""
    if args.config_file:
        register_from_config(load_config(args.config_file))
    if args.json:
        register_instances(args.dataset, args.json, args.images)
    support_dataset = args.support_dataset or args.dataset
    for name in (args.dataset, support_dataset):
        if name not in DatasetCatalog.list():
            raise ValueError(
                f"data set must be registered, got {name!r} (see --json, --config-file)"
            )
    if args.tuples is not None:
        plans = _tuple_plans(args)
    else:
        plans = _evaluation_plans(args) if args.ways is None else _benchmark_plans(args)
    if not plans:
        raise ValueError(f"--split {args.split} must have {args.side} classes, got none")
    for plan in plans:
        path = args.output / plan.file_name
        plan.save(path)
        size = f"{len(plan.episodes)} episodes"
        if isinstance(plan, EvaluationPlan):
            size += f", {plan.num_pairs} pairs"
        print(f"{path}  sha256 {plan.sha256}  {size}")


def _evaluation_plans(args: argparse.Namespace) -> list[EvaluationPlan]:
    return [
        plan
        for shots in args.shots
        for plan in build_plans(
            **_source(args),
            runs=args.runs,
            protocol=args.protocol,
            shots=shots,
            max_images=args.max_images,
            fixed_supports=args.fixed_supports,
            foreign_images=not args.no_foreign_images,
        )
    ]


def _benchmark_plans(args: argparse.Namespace) -> list[BenchmarkPlan]:
    return build_benchmark_plans(
        **_source(args),
        ways=args.ways,
        shots=args.shots,
        queries_per_class=args.queries_per_class,
        num_episodes=args.episodes,
    )


def _tuple_plans(args: argparse.Namespace) -> list[TuplePlan]:
    return build_tuple_plans(
        **_source(args),
        shots=args.shots,
        num_episodes=args.tuples,
        ground_truth=GroundTruthFilter(not args.no_difficult, args.min_area, args.max_boxes),
    )


def _source(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "dataset": args.dataset,
        "support_dataset": args.support_dataset or args.dataset,
        "split": args.split,
        "sides": (args.side,),
        "seed": args.seed,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool; bad input ends it with one line."""
    try:
        write_plans(parse_args(argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"make_episodes: {error}") from error


if __name__ == "__main__":
    main()
