"""Training and testing of ``DMLClassifier`` (RepMet section 5.1): the trainer of episodes on class-balanced batches."""

from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from torch import nn

from ..data.class_batches import ClassBatchLoader, build_classification_test_loader
from ..evaluation.classification import TopOneEvaluator
from ..files import atomic_path
from ..visualization.embedding import tsne_figure
from .hooks import TrainingPictures
from .plans import write_results
from .solver import unwrapped
from .trainer import EpisodicTrainer

_DRAWN_CLASSES = 20


class ClassificationTrainer(EpisodicTrainer):
    """EpisodicTrainer on class-balanced batches, with top-1 error and a picture of the embedding."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ClassBatchLoader:
        """Endless class-balanced batches."""
        return ClassBatchLoader(cfg)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Top-1 error on FEWSHOT.CLASSIFY.TEST; see ``evaluate_classifier``."""
        return evaluate_classifier(cfg, model)

    def build_hooks(self) -> list[Any]:
        """The hooks of EpisodicTrainer; pictures are of the embedding instead of detections."""
        built = [h for h in super().build_hooks() if not isinstance(h, TrainingPictures)]
        pictures = [EmbeddingPictures(self.cfg, self.model)] if self.cfg.VIS_PERIOD > 0 else []
        # The writers stay the last.
        return built[:-1] + pictures + built[-1:]


class EmbeddingPictures(HookBase):
    """Every VIS_PERIOD iterations, and at the start, test and write OUTPUT_DIR/tsne_<iteration>.png (paper Fig. 5)."""

    def __init__(self, cfg: CfgNode, model: nn.Module):
        """Every process must have this hook: all of them test."""
        self.cfg, self.model = cfg, model

    def before_train(self) -> None:
        """Draw the random embedding of a run that starts."""
        if self.trainer.iter == 0:
            self._draw(0)

    def after_step(self) -> None:
        """Draw where it is due."""
        if (self.trainer.iter + 1) % self.cfg.VIS_PERIOD == 0:
            self._draw(self.trainer.iter + 1)

    def _draw(self, iteration: int) -> None:
        evaluate_classifier(self.cfg, self.model, picture=f"tsne_{iteration:07d}.png")


def evaluate_classifier(
    cfg: CfgNode, model: nn.Module, *, picture: str = "tsne.png"
) -> dict[str, Any]:
    """Top-1 error, its 95 % interval and the number of images, into OUTPUT_DIR/results.json; beside it the picture.

    Args:
        model: a ``DMLClassifier``, perhaps wrapped for several processes.
        picture: name of the t-SNE of the first 20 classes in OUTPUT_DIR.

    Returns:
        ``{"classification": {metric: percent or number}}``; empty off the main process and without a test set.
    """
    if not cfg.FEWSHOT.CLASSIFY.TEST:
        return {}
    loader, class_names = build_classification_test_loader(cfg)
    evaluator = TopOneEvaluator(kept_classes=_DRAWN_CLASSES)
    results = inference_on_dataset(model, loader, evaluator)
    if not comm.is_main_process():
        return {}
    write_results(cfg, results)
    print_csv_format(results)
    if len(evaluator.labels):
        classifier = unwrapped(model)
        figure = tsne_figure(
            evaluator.embeddings.numpy(),
            evaluator.labels.numpy(),
            classifier.representatives[:_DRAWN_CLASSES].detach().cpu().numpy(),
            class_names=class_names[:_DRAWN_CLASSES],
            title=f"t-SNE of {len(evaluator.labels)} test images",
        )
        with atomic_path(Path(cfg.OUTPUT_DIR) / picture) as path:
            figure.savefig(path, format="png")
    return results
