"""Training and evaluation: what ``tools/train_net.py`` calls."""

from .evaluate import evaluate, evaluate_only
from .selection import select_checkpoint
from .self_paced import train_self_paced
from .setup import launch_from_command_line, setup
from .trainer import EpisodicTrainer

__all__ = [
    "EpisodicTrainer",
    "evaluate",
    "evaluate_only",
    "launch_from_command_line",
    "select_checkpoint",
    "setup",
    "train_self_paced",
]
