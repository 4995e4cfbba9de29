#!/usr/bin/env python3
"""Search images for instances: writes rank lists, which self-paced training learns from, and prints their SHA-256.

Examples::

    python tools/make_rank_lists.py --config-file configs/retrieval/mobilenet_v2.yaml \
        --dataset flickrlogos27_gallery --query-dataset flickrlogos27_queries --output output/flickrlogos27_lists
    python tools/make_rank_lists.py --config-file configs/retrieval/mobilenet_v2.yaml \
        --images photos --query cup.jpg:120,40,200,180:cup --query cup2.jpg:10,10,90,80:cup --output output/photos
    python tools/make_rank_lists.py --config-file configs/retrieval/coco482.yaml --plan plan.json --output output/shots
    python tools/make_rank_lists.py --config-file configs/retrieval/coco482.yaml --expand output/shots/rank_lists.json \
        --labels output/run/stage_1.json --output output/shots
    python tools/make_rank_lists.py --import lists_of_another_search.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from fewshot_d2 import load_config
from fewshot_d2.data.coco_json import register_instances
from fewshot_d2.data.loaders import build_index, pool_indices, register_from_config
from fewshot_d2.data.plans import EvaluationPlan
from fewshot_d2.data.pseudo_labels import PseudoLabels
from fewshot_d2.data.rank_lists import RankList, RankLists
from fewshot_d2.data.search_queries import (
    CHOICES,
    FolderQuery,
    annotated_queries,
    folder_dataset,
    planned_queries,
)
from fewshot_d2.engine.query_expansion import expand_rank_lists
from fewshot_d2.engine.region_search import search_regions
from fewshot_d2.engine.setup import join_torchrun
from fewshot_d2.files import write_json


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", help="registered name of what is searched")
    source.add_argument("--images", type=Path, help="or a folder of images, without annotations")
    source.add_argument(
        "--plan", help="or the data set of an evaluation plan's supports, for these supports"
    )
    source.add_argument("--expand", help="or once more, for what was found with these rank lists")
    source.add_argument("--import", dest="foreign", help="check the rank lists of another search")
    parser.add_argument("--config-file", default="", help="one of configs/retrieval")
    parser.add_argument("--query-dataset", help="queries are its boxes (default: --dataset)")
    parser.add_argument("--queries", choices=CHOICES, default="largest", help="box of each image")
    parser.add_argument("--per-label", type=int, help="so many queries of a category, the first")
    parser.add_argument(
        "--query", action="append", default=[], help="with --images: file:x,y,w,h[:label]; repeat"
    )
    parser.add_argument(
        "--labels", help="with --expand: stage file whose confident boxes are queries"
    )
    parser.add_argument("--instances", type=int, default=10, help="with --expand: boxes of a query")
    parser.add_argument("--seed", type=int, default=0, help="with --expand: of their draw")
    parser.add_argument("--name", help="of the data set of --images (default: the folder's name)")
    parser.add_argument("--output", type=Path, help="folder of the rank lists and the regions")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ... of the config")
    args = parser.parse_args(argv)
    if args.foreign is None and (args.output is None or not args.config_file):
        parser.error("--config-file and --output must be given")
    if (args.images is None) != (not args.query):
        parser.error("--images and --query must be given together")
    if (args.expand is None) != (args.labels is None):
        parser.error("--expand and --labels must be given together")
    return args


def make_rank_lists(args: argparse.Namespace) -> None:
    """Search, save and print."""
    cfg = load_config(args.config_file, args.opts)
    register_from_config(cfg)
    if args.foreign is not None:
        lists = RankLists.load(args.foreign)
        _check_registered(lists.dataset, lists.query_dataset)
        lists.check(*pool_indices(lists))
        _print_summary(lists, args.foreign)
        return
    lists = _expanded(cfg, args) if args.expand else _searched(cfg, args)
    if lists is not None:
        path = args.output / ("expanded_lists.json" if args.expand else "rank_lists.json")
        lists.save(path)
        _print_summary(lists, path)
        if args.images:
            _print_config(args, lists.dataset, path)


def _searched(cfg: CfgNode, args: argparse.Namespace) -> RankLists | None:
    source = _folder if args.images else _planned if args.plan else _data_sets
    dataset, query_dataset, queries = source(args)
    return search_regions(
        cfg,
        dataset=dataset,
        query_dataset=query_dataset,
        queries=queries,
        folder=args.output,
    )


def _expanded(cfg: CfgNode, args: argparse.Namespace) -> RankLists | None:
    lists = RankLists.load(args.expand)
    _check_registered(lists.dataset, lists.query_dataset)
    return expand_rank_lists(
        cfg,
        lists,
        PseudoLabels.load(args.labels),
        number=args.instances,
        seed=args.seed,
        folder=args.output,
    )


def _planned(args: argparse.Namespace) -> tuple[str, str, tuple[RankList, ...]]:
    plan = EvaluationPlan.load(args.plan)
    name = plan.support_dataset
    _check_registered(name)
    return name, name, planned_queries(plan, build_index(name, plan.class_ids))


def _data_sets(args: argparse.Namespace) -> tuple[str, str, tuple[RankList, ...]]:
    query_dataset = args.query_dataset or args.dataset
    _check_registered(args.dataset, query_dataset)
    queries = annotated_queries(build_index(query_dataset), args.queries, args.per_label)
    return args.dataset, query_dataset, queries


def _folder(args: argparse.Namespace) -> tuple[str, str, tuple[RankList, ...]]:
    """Register the folder by a json in the output folder."""
    name, path = _folder_name(args), _folder_json(args)
    if name in DatasetCatalog.list():
        raise ValueError(f"--name must be a new one, got {name!r}, which is a data set already")
    queries = [FolderQuery.parse(text) for text in args.query]
    content, lists, broken = folder_dataset(args.images, queries)
    if comm.is_main_process():
        write_json(path, content)
        for file_name in broken:
            print(f"left out, cannot be read: {file_name}")
        print(f"{path}  {len(content['images'])} images, {len(broken)} left out")
    comm.synchronize()
    register_instances(name, path, args.images.resolve())
    return name, name, lists


def _folder_name(args: argparse.Namespace) -> str:
    return args.name or args.images.resolve().name


def _folder_json(args: argparse.Namespace) -> Path:
    return args.output.resolve() / "instances.json"


def _check_registered(*names: str) -> None:
    for name in names:
        if name not in DatasetCatalog.list():
            raise ValueError(f"data set must be registered, got {name!r} (see FEWSHOT.REGISTER)")


def _print_summary(lists: RankLists, path: str | Path) -> None:
    lengths = [len(row.candidates) for row in lists]
    images = {c.image_id for row in lists for c in row.candidates}
    print(f"{path}  sha256 {lists.sha256}")
    print(
        f"{len(lists)} queries of {lists.query_dataset}, {min(lengths)} to {max(lengths)} candidates each, "
        f"{len(images)} images of {lists.dataset}"
    )
    print(lists.method)


def _print_config(args: argparse.Namespace, name: str, lists: Path) -> None:
    row = [name, str(_folder_json(args)), str(args.images.resolve())]
    print("Lines for the config of tools/train_self_paced.py:")
    # JSON is YAML, and quotes what must be.
    print(f"FEWSHOT:\n  REGISTER: {json.dumps([row])}")
    print(f"  SELF_PACED:\n    RANK_LISTS: {json.dumps(str(lists.resolve()))}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool; bad input ends it with one line."""
    try:
        args = parse_args(argv)
        join_torchrun()
        setup_logger(distributed_rank=comm.get_rank(), name="fewshot_d2")
        make_rank_lists(args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"make_rank_lists: {error}") from error


if __name__ == "__main__":
    main()
