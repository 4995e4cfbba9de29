"""Cost of one stage's pseudo-labelling relative to the plain detector, on the first queries of a rank-list file.

The plain detector gets each mapped image with the encoded queries that are searched in it, and nothing else is timed;
once with all of them at a time as pseudo-labelling does it, and once with one query a time on a sample of the images.
Random weights do: the heads do the same work.
"""

import argparse
import time

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.modeling import build_model

from fewshot_d2 import load_config
from fewshot_d2.data.loaders import build_mapper, pool_indices, register_from_config
from fewshot_d2.data.rank_lists import RankLists
from fewshot_d2.engine.candidate_search import CandidateImages, encode_queries, search_candidates
from fewshot_d2.modeling.detector import FewShotDetector


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default="configs/spil/flickrlogos27.yaml")
    parser.add_argument("--queries", type=int, default=27)
    parser.add_argument("--sample", type=int, default=20, help="images of the one-by-one pass")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides")
    return parser.parse_args()


@torch.no_grad()
def plain_seconds(
    cfg: CfgNode, model: FewShotDetector, rank_lists: RankLists, sample: int
) -> tuple[float, int, float, int]:
    """Seconds and pairs of the detector alone, all queries of an image at once; and one at a time on a sample."""
    query_index, index = pool_indices(rank_lists)
    mapper = build_mapper(cfg, is_train=False)
    images = CandidateImages(rank_lists, index, mapper)
    features = encode_queries(model, rank_lists, query_index, mapper)
    together, alone, num_pairs, num_alone = 0.0, 0.0, 0, 0
    loader = build_detection_test_loader(images, mapper=None, num_workers=0)
    for number, (query,) in enumerate(loader):
        rows = [row for row, _ in query["places"]]
        start = time.perf_counter()
        model([{**query, "support_features": features[rows]}])
        together += time.perf_counter() - start
        num_pairs += len(rows)
        if number < sample:
            start = time.perf_counter()
            for row in rows:
                model([{**query, "support_features": features[[row]]}])
            alone += time.perf_counter() - start
            num_alone += len(rows)
    return together, num_pairs, alone, num_alone


def main() -> None:
    """Print images a second, an image counted once for each query that is searched in it, and the ratios."""
    args = parse()
    torch.manual_seed(0)
    cfg = load_config(args.config_file, args.opts)
    register_from_config(cfg)
    whole = RankLists.load(cfg.FEWSHOT.SELF_PACED.RANK_LISTS)
    rank_lists = RankLists(
        whole.dataset, whole.query_dataset, whole.method, whole.lists[: args.queries]
    )
    model = build_model(cfg).eval()
    # One detection a pair as in pseudo-labelling, so that as many masks are made.
    model.roi_heads.box_predictor.test_topk_per_image = cfg.FEWSHOT.SELF_PACED.BOXES_PER_IMAGE
    together, num_pairs, alone, num_alone = plain_seconds(cfg, model, rank_lists, args.sample)
    start = time.perf_counter()
    search_candidates(cfg, model, rank_lists, stage=1, threshold=0.5)
    labelling = num_pairs / (time.perf_counter() - start)
    print(f"{len(rank_lists)} queries, {num_pairs} candidates")
    print(f"pseudo-labelling with reading:    {labelling:7.2f} images/s")
    for name, rate in (
        ("plain detector, queries together", num_pairs / together),
        ("plain detector, one query a time", num_alone / alone),
    ):
        print(f"{name}: {rate:7.2f} images/s, ratio {labelling / rate:.2f}")


if __name__ == "__main__":
    main()
