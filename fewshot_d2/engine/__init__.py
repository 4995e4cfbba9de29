"""Training and evaluation: what ``tools/train_net.py`` calls."""

from .evaluate import evaluate, evaluate_only
from .setup import setup
from .trainer import EpisodicTrainer

__all__ = ["EpisodicTrainer", "evaluate", "evaluate_only", "setup"]
