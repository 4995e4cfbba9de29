"""Self-paced training on rank lists (SPIL, paper 3.3 and algorithm 1): learn, search the candidates, learn from those.

A stage is an ordinary training run in OUTPUT_DIR/stage_k with the weights of the one before. What its network finds
is OUTPUT_DIR/stage_<k + 1>.json; the next stage reads that file and nothing else, so a run goes on after any of them.

A network that was trained on other lists is used on new ones without training (spec B3, item 20) by MODEL.WEIGHTS,
SOLVER.MAX_ITER 0 and THRESHOLDS ().
"""

import logging
from dataclasses import replace
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm

from ..checkpoint import FewShotCheckpointer
from ..data.pseudo_labels import PseudoLabels
from ..data.rank_lists import RankLists
from ..files import write_text
from .candidate_search import search_candidates
from .trainer import EpisodicTrainer

logger = logging.getLogger(__name__)

_FINAL = "model_final.pth"


def train_self_paced(cfg: CfgNode, *, resume: bool) -> list[PseudoLabels]:
    """Run all stages, or those that are missing.

    Args:
        cfg: FEWSHOT.TRAIN_ON is "rank_lists"; SOLVER is of stage 0, FEWSHOT.SELF_PACED of the others.
        resume: go on where OUTPUT_DIR ends, at a stage's start or in the midst of it.

    Returns:
        What the network of stage 0, 1, ... found in the candidates; the first are learned from in stage 1.

    Raises:
        ValueError: a run is there that is not to be resumed, or one of other rank lists; a key is out of its range, or
            no list has a candidate.
    """
    _check_config(cfg)
    output = Path(cfg.OUTPUT_DIR)
    if not resume and any(output.glob("stage_*")):
        raise ValueError(
            f"{output} must be empty or resumed (--resume), got {next(output.glob('stage_*')).name}"
        )
    rank_lists = RankLists.load(cfg.FEWSHOT.SELF_PACED.RANK_LISTS)
    if not any(row.candidates for row in rank_lists):
        raise ValueError(
            f"{cfg.FEWSHOT.SELF_PACED.RANK_LISTS} must have candidates, got none in {len(rank_lists)} lists"
        )
    _keep_to(output, rank_lists)
    found: list[PseudoLabels] = []
    for stage in range(1 + len(cfg.FEWSHOT.SELF_PACED.THRESHOLDS)):
        labels = _finished(cfg, stage, rank_lists)
        if labels is None:
            labels = _run_stage(cfg, stage, rank_lists)
        found.append(labels)
        _report(cfg, stage, labels, rank_lists)
    return found


def _check_config(cfg: CfgNode) -> None:
    """Refuse what would only fail, or do nothing, once a stage has been trained."""
    node = cfg.FEWSHOT.SELF_PACED
    if cfg.FEWSHOT.TRAIN_ON != "rank_lists" or not node.RANK_LISTS:
        raise ValueError(
            "FEWSHOT.TRAIN_ON must be 'rank_lists' and FEWSHOT.SELF_PACED.RANK_LISTS a file, got "
            f"{cfg.FEWSHOT.TRAIN_ON!r} and {node.RANK_LISTS!r}"
        )
    if not all(0 <= threshold <= 1 for threshold in node.THRESHOLDS) or node.BOXES_PER_IMAGE < 1:
        raise ValueError(
            "FEWSHOT.SELF_PACED.THRESHOLDS must be in [0, 1] and BOXES_PER_IMAGE at least 1, got "
            f"{node.THRESHOLDS} and {node.BOXES_PER_IMAGE}"
        )
    if node.THRESHOLDS and node.MAX_ITER < 1:
        raise ValueError(
            f"FEWSHOT.SELF_PACED.MAX_ITER must be at least 1 where THRESHOLDS give stages, got {node.MAX_ITER}"
        )
    if cfg.SOLVER.MAX_ITER < 1 and (node.THRESHOLDS or not cfg.MODEL.WEIGHTS):
        raise ValueError(
            "SOLVER.MAX_ITER must be at least 1 unless MODEL.WEIGHTS are given and THRESHOLDS are none, got "
            f"{cfg.SOLVER.MAX_ITER}, {cfg.MODEL.WEIGHTS!r} and {node.THRESHOLDS}"
        )


def _keep_to(output: Path, rank_lists: RankLists) -> None:
    """Remember a run's rank lists: a first stage that has not ended leaves no other trace of them."""
    path = output / "rank_lists.sha256"
    known = path.read_text(encoding="utf-8") if path.is_file() else rank_lists.sha256
    if known != rank_lists.sha256:
        raise ValueError(
            f"{output} has a run on other rank lists: they must be those of {known}, got {rank_lists.sha256}"
        )
    if comm.is_main_process():
        write_text(path, rank_lists.sha256)


def stage_config(cfg: CfgNode, stage: int) -> CfgNode:
    """The config of one stage's training run."""
    cfg = cfg.clone()
    cfg.defrost()
    output, node = Path(cfg.OUTPUT_DIR), cfg.FEWSHOT.SELF_PACED
    cfg.OUTPUT_DIR = str(output / f"stage_{stage}")
    # Plans of a data set are evaluated with the last weights, by tools/train_net.py --eval-only.
    cfg.DATASETS.TEST = ()
    if stage > 0:
        cfg.MODEL.WEIGHTS = str(output / f"stage_{stage - 1}" / _FINAL)
        node.LABELS = str(labels_file(output, stage))
        cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = node.MAX_ITER, node.STEPS
        cfg.SOLVER.WARMUP_ITERS = 0
    cfg.freeze()
    return cfg


def labels_file(folder: str | Path, stage: int) -> Path:
    """What stage ``stage`` of the run in ``folder`` learns from; the file after the last stage is the result."""
    return Path(folder) / f"stage_{stage}.json"


def _finished(cfg: CfgNode, stage: int, rank_lists: RankLists) -> PseudoLabels | None:
    """What an earlier run found after this stage; None where that is missing or broken and is to be found again."""
    path = labels_file(cfg.OUTPUT_DIR, stage + 1)
    try:
        labels = PseudoLabels.load(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("The candidates are searched again: %s", error)
        return None
    labels.check(rank_lists)
    threshold = threshold_after(cfg, stage)
    if labels.threshold == threshold:
        return labels
    if Path(stage_config(cfg, stage + 1).OUTPUT_DIR).exists():
        raise ValueError(
            f"{path} must be of threshold {threshold} as FEWSHOT.SELF_PACED.THRESHOLDS says, got {labels.threshold}, "
            f"which stage {stage + 1} has learned from"
        )
    # The file has all boxes, also those below the threshold.
    labels = replace(labels, threshold=threshold)
    _save(cfg, labels)
    return labels


def threshold_after(cfg: CfgNode, stage: int) -> float:
    """Threshold of what the network of ``stage`` finds, so that of the stage that learns from it.

    What the last stage finds is learned from by none, and has the threshold of the stage before.
    """
    thresholds = cfg.FEWSHOT.SELF_PACED.THRESHOLDS
    return thresholds[min(stage, len(thresholds) - 1)] if thresholds else 0.0


def _save(cfg: CfgNode, labels: PseudoLabels) -> None:
    # Every process must have read a file that is there before it changes.
    comm.synchronize()
    if comm.is_main_process():
        labels.save(labels_file(cfg.OUTPUT_DIR, labels.stage))
    comm.synchronize()


def _run_stage(cfg: CfgNode, stage: int, rank_lists: RankLists) -> PseudoLabels:
    """Train unless that is done or not wanted, then search."""
    of_stage = stage_config(cfg, stage)
    final = Path(of_stage.OUTPUT_DIR) / _FINAL
    if final.is_file() or of_stage.SOLVER.MAX_ITER < 1:
        model = build_model(of_stage)
        FewShotCheckpointer(model).load(str(final) if final.is_file() else of_stage.MODEL.WEIGHTS)
    else:
        trainer = EpisodicTrainer(of_stage)
        trainer.resume_or_load(resume=True)
        trainer.train()
        model = trainer.checkpointer.model
    labels = search_candidates(
        of_stage, model, rank_lists, stage=stage + 1, threshold=threshold_after(cfg, stage)
    )
    _save(cfg, labels)
    return labels


def _report(cfg: CfgNode, stage: int, labels: PseudoLabels, rank_lists: RankLists) -> None:
    num_positives = cfg.FEWSHOT.NUM_SHOTS
    confident = [len(labels.confident(row)) for row in range(len(rank_lists))]
    logger.info(
        "After stage %d: %d of %d candidates are above %.2f, in %d of %d lists at least %d",
        *(stage, sum(confident), sum(len(row.candidates) for row in rank_lists), labels.threshold),
        *(sum(n >= num_positives for n in confident), len(confident), num_positives),
    )
