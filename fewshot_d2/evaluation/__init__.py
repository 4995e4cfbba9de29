"""Evaluation of plans: average precision, presence, baselines and the report."""

from .baselines import detection_shift, gt_shift
from .coco_scoring import GroundTruth, TaskScores, score_detections
from .episodic_coco import EpisodicCOCOEvaluator, evaluate_detections
from .metrics import confidence_interval, summarize_runs
from .report import EvaluatedRun, ReportFacts, ReportRow, write_report

__all__ = [
    "EpisodicCOCOEvaluator",
    "EvaluatedRun",
    "GroundTruth",
    "ReportFacts",
    "ReportRow",
    "TaskScores",
    "confidence_interval",
    "detection_shift",
    "evaluate_detections",
    "gt_shift",
    "score_detections",
    "summarize_runs",
    "write_report",
]
