"""Write rank lists of a search of a given quality, made from a data set's annotations."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fewshot_d2.data.loaders import build_index
from fewshot_d2.data.rank_lists import RankLists
from fewshot_d2.data.search_queries import annotated_queries
from fewshot_d2.data.simulated_lists import simulated_lists


def main(argv: Sequence[str] | None = None) -> None:
    """Make the lists, save them and print their hash."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True, help="registered name; the queries' too")
    parser.add_argument("--per-label", type=int, default=1, help="queries of a category, the first")
    parser.add_argument("--depth", type=int, default=128)
    parser.add_argument("--precision", type=float, default=0.6, help="share of true images")
    parser.add_argument("--box-iou", type=float, default=0.4, help="of a box with the instance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder of rank_lists.json")
    args = parser.parse_args(argv)
    index = build_index(args.dataset)
    quality = {name: getattr(args, name) for name in ("depth", "precision", "box_iou", "seed")}
    queries = annotated_queries(index, per_label=args.per_label)
    method = "simulated from annotations: " + ", ".join(f"{k} {v}" for k, v in quality.items())
    lists = RankLists(
        args.dataset, args.dataset, method, simulated_lists(index, queries, **quality)
    )
    path = args.output / "rank_lists.json"
    lists.save(path)
    print(f"{path}  sha256 {lists.sha256}\n{len(lists)} queries; {method}")


if __name__ == "__main__":
    main()
