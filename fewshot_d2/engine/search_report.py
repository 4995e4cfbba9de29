"""Evaluation of instance search and of self-paced runs on it: numbers, curves, pictures, a page (SPIL, paper 5).

Annotations are read here and nowhere in training. Boxes are XYXY in pixels of the original image.
"""

import hashlib
import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from ..data.loaders import pool_indices
from ..data.pseudo_labels import PseudoLabels
from ..data.rank_lists import RankLists
from ..evaluation.coco_scoring import GroundTruth
from ..evaluation.report import ReportFacts
from ..evaluation.report_gallery import GalleryPicture
from ..evaluation.search_page import (
    SearchPage,
    compare,
    recall_figures,
    recall_table,
    render,
)
from ..evaluation.search_pictures import PictureReader, choose_queries, draw_stages
from ..evaluation.search_runs import (
    Box,
    MeasuredRow,
    SearchTruth,
    best_boxes,
    search_row,
    stage_row,
)
from ..files import write_bytes, write_json, write_text
from .reranking import Describe, Reranker
from .self_paced import labels_file

logger = logging.getLogger(__name__)

Stages = dict[str, PseudoLabels]
RERANKED = "re-ranked"


def evaluate_search(
    cfg: CfgNode,
    runs: Mapping[str, str | Path],
    describe: Describe | None = None,
    *,
    num_pictures: int = 3,
    command: str = "",
) -> dict[str, Any]:
    """Measure rank lists and the stages of runs on them; write it all below OUTPUT_DIR.

    Args:
        cfg: FEWSHOT.SELF_PACED.RANK_LISTS, FEWSHOT.RETRIEVAL.DEPTH (candidates of a list that count), SEED (which
            queries are drawn) and OUTPUT_DIR.
        runs: {name: OUTPUT_DIR of ``train_self_paced``}; others are compared with the first. None: the search alone.
        describe: vectors of boxes, to re-rank by those of the last stage; None = no re-ranking.
        num_pictures: queries that are drawn. command: for the page.

    Returns:
        The content of results.json.

    Raises:
        ValueError: rank lists, data sets and stages do not fit each other, or a run has no stage that can be read.
    """
    start, seed, path = time.perf_counter(), max(cfg.SEED, 0), cfg.FEWSHOT.SELF_PACED.RANK_LISTS
    depth, rank_lists = cfg.FEWSHOT.RETRIEVAL.DEPTH, RankLists.load(path)
    rank_lists.check(*pool_indices(rank_lists))
    images = GroundTruth.of_dataset(rank_lists.dataset)
    query_images = images
    if rank_lists.query_dataset != rank_lists.dataset:
        query_images = GroundTruth.of_dataset(rank_lists.query_dataset)
    truth = SearchTruth.of(rank_lists, images, query_images)
    rows, stages, skipped = [search_row(rank_lists, truth)], {}, []
    for name, folder in runs.items():
        stages[name], measured, left_out = read_run(name, Path(folder), rank_lists, truth)
        rows += measured
        skipped += left_out
    if describe is not None:
        rows += reranked_rows(rank_lists, truth, stages, describe)
    read = PictureReader()
    chosen = choose_queries(
        *(rank_lists, truth, images, query_images, read), seed=seed, num_queries=num_pictures
    )
    results = {
        "rank_lists": _facts_of(path, rank_lists),
        "depth": depth,
        "seed": seed,
        "runs": {name: {"folder": str(f), "seed": seed_of(f)} for name, f in runs.items()},
        "skipped": skipped,
        "num_pictures_unread": read.num_unread,
        "drawn_query_ids": [rank_lists.lists[query.number].query_id for query in chosen],
        "rows": compare(rows, depth),
    }
    facts = ReportFacts(
        command=command,
        config=cfg.dump(),
        seeds={"pictures": seed},
        elapsed={"evaluation": time.perf_counter() - start},
    )
    pictures = {
        name: [
            draw_stages(query, rank_lists, truth, _tracks(rank_lists, labels)) for query in chosen
        ]
        for name, labels in stages.items()
    }
    _write(Path(cfg.OUTPUT_DIR), results, rows, pictures, facts)
    return results


def read_run(
    name: str, folder: Path, rank_lists: RankLists, truth: SearchTruth
) -> tuple[Stages, list[MeasuredRow], list[str]]:
    """Measure all stages of a run.

    Returns:
        {stage: what it found}, a row for each, and a message for each file that is missing between others or broken.

    Raises:
        ValueError: no file can be read, or one is of other rank lists.
    """
    numbers = [
        re.fullmatch(r"stage_(\d+)\.json", path.name) for path in folder.glob("stage_*.json")
    ]
    last = max((int(match[1]) for match in numbers if match), default=0)
    stages, rows, skipped = {}, [], []
    for number in range(1, last + 1):
        path = labels_file(folder, number)
        try:
            labels = PseudoLabels.load(path)
            if labels.stage != number:
                raise ValueError(f"{path} must be of stage {number}, got {labels.stage}")
        except (ValueError, FileNotFoundError) as error:
            skipped.append(f"{name}: stage {number - 1} is left out: {error}")
            logger.error("%s", skipped[-1])
            continue
        try:
            row = stage_row(name, rank_lists, labels, truth)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        stages[row.stage] = labels
        file = {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        rows.append(replace(row, facts={**file, **row.facts}))
    if not rows:
        raise ValueError(
            f"run {name!r} must have stage_1.json or a later one that can be read in {folder}, got "
            f"{'; '.join(skipped) or 'none'}"
        )
    return stages, rows, skipped


def seed_of(folder: str | Path) -> int | None:
    """The seed that a run was trained with, if its folder tells."""
    try:
        content = yaml.safe_load((Path(folder) / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content.get("SEED") if isinstance(content, dict) else None


def reranked_rows(
    rank_lists: RankLists,
    truth: SearchTruth,
    runs: Mapping[str, Stages],
    describe: Describe,
) -> list[MeasuredRow]:
    """The lists in the order of new vectors of the search's own boxes, and of those of each run's last stage."""
    found = {"": _own_boxes(rank_lists)}
    sources = {"": "search"}
    for name, stages in runs.items():
        sources[name], labels = [*stages.items()][-1]
        found[name] = list(best_boxes(labels))
    reranker = Reranker(rank_lists, found.values(), describe)
    rows = []
    for name, of_run in found.items():
        queries = []
        for before, after, boxes in zip(rank_lists, reranker(of_run), of_run, strict=True):
            box_of = {c.image_id: box for c, box in zip(before.candidates, boxes, strict=True)}
            queries.append(truth.query(after, [box_of[c.image_id] for c in after.candidates]))
        stage = RERANKED if name else f"search, {RERANKED}"
        facts = {"boxes_of": sources[name], **reranker.facts}
        rows.append(MeasuredRow(name, stage, queries, facts))
    return rows


def _tracks(rank_lists: RankLists, stages: Stages) -> dict[str, list[list[Box | None]]]:
    """What the search and each stage found in every candidate."""
    found = {name: list(best_boxes(labels)) for name, labels in stages.items()}
    return {"search": _own_boxes(rank_lists), **found}


def _own_boxes(rank_lists: RankLists) -> list[list[Box]]:
    return [[c.box for c in row.candidates] for row in rank_lists]


def _facts_of(path: str, rank_lists: RankLists) -> dict[str, Any]:
    return {
        "file": path,
        "sha256": rank_lists.sha256,
        "dataset": rank_lists.dataset,
        "query_dataset": rank_lists.query_dataset,
        "method": rank_lists.method,
        "num_queries": len(rank_lists),
    }


def _write(
    output: Path,
    results: Mapping[str, Any],
    rows: Sequence[MeasuredRow],
    pictures: Mapping[str, Sequence[GalleryPicture]],
    facts: ReportFacts,
) -> None:
    depth, lists = results["depth"], results["rank_lists"]
    write_json(output / "results.json", _finite(results), indent=1)
    write_text(output / "recall_iou.csv", recall_table(rows, depth))
    figures = recall_figures(rows, depth)
    for name, png in figures.items():
        write_bytes(output / f"recall_iou{'_' * bool(name)}{name}.png", png)
    for name, of_run in pictures.items():
        for query_id, picture in zip(results["drawn_query_ids"], of_run, strict=True):
            write_bytes(output / "pictures" / f"{name}_{query_id}.jpg", picture.jpeg)
    page = SearchPage(
        lead=f"{lists['num_queries']} queries of {lists['query_dataset']} in {lists['dataset']}, the first {depth} "
        f"images of their lists ({lists['method']}, SHA-256 {lists['sha256']}).",
        facts=facts,
        figures={name or "the search and all runs": png for name, png in figures.items()},
        pictures=pictures,
        warnings=results["skipped"],
    )
    write_text(output / "report.html", render(results["rows"], page))
    logger.info("Report: %s", output / "report.html")


def _finite(content: Any) -> Any:
    """JSON content with null for what is not a number."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
