"""What the subcommands share: the arguments that name a model and supports, and tables."""

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from ..config import load_config
from ..decoding import printable
from ..inference.support_editing import SPECIFICATION, merged, support_set_of
from ..predictor import FewShotPredictor
from ..structures import SupportSet

# What `make demo` leaves.
DEMO = Path("output/demo")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``build_predictor``."""
    group = parser.add_argument_group("model")
    group.add_argument("--config-file", metavar="CFG", help=f"config; default: {DEMO}/config.yaml")
    group.add_argument(
        "--weights",
        metavar="FILE",
        help=f"checkpoint; default: of the config, {DEMO}/model_final.pth without one",
    )
    group.add_argument("--device", default="", help="cpu, cuda, cuda:1; default: of the config")
    group.add_argument(
        "--precision", default="fp32", choices=("fp32", "amp", "bf16"), help="amp needs a GPU"
    )
    group.add_argument("--batch-size", type=int, default=0, help="default: 8 on a GPU, 1 on a CPU")
    group.add_argument("--workers", type=int, default=1, help="threads that read images ahead")
    group.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="changes of the config"
    )


def build_predictor(args: argparse.Namespace) -> FewShotPredictor:
    """The model that the arguments name, or the demo's.

    Raises:
        ValueError: no such file, a broken config, or no weights.
    """
    config, weights = args.config_file, args.weights
    if not config and not weights:
        if not (DEMO / "model_final.pth").is_file():
            raise ValueError(
                "a model must be given by --config-file and --weights, or trained by `make demo`; got neither"
            )
        config, weights = str(DEMO / "config.yaml"), str(DEMO / "model_final.pth")
    if not config:
        raise ValueError(f"--weights {printable(weights)} must have its --config-file, got none")
    cfg = _config_of(config, args.opts)
    weights = weights or cfg.MODEL.WEIGHTS
    if not weights or not Path(weights).is_file():
        raise ValueError(f"--weights must be a checkpoint file, got '{printable(weights)}'")
    if args.batch_size < 0 or args.workers < 1:
        raise ValueError(
            f"--batch-size must be at least 0 and --workers 1, got {args.batch_size} and {args.workers}"
        )
    return FewShotPredictor(
        cfg,
        weights,
        device=args.device,
        precision=args.precision,
        batch_size=args.batch_size,
        workers=args.workers,
    )


def _config_of(config_file: str, options: Sequence[str]) -> Any:
    if not Path(config_file).is_file():
        raise ValueError(f"--config-file must be a file, got '{printable(config_file)}'")
    try:
        return load_config(config_file, options)
    # yacs and detectron2 assert; a key that does not exist is a KeyError.
    except (AssertionError, KeyError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{printable(config_file)} must be a config, got: {error}") from error


def add_support_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``read_supports``."""
    group = parser.add_argument_group("examples")
    group.add_argument(
        "--support", action="append", default=[], metavar="SPEC", help=f"{SPECIFICATION}; repeat"
    )
    group.add_argument(
        "--supports", action="append", default=[], metavar="FILE", help="support-set file; repeat"
    )


def read_supports(args: argparse.Namespace) -> SupportSet:
    """All examples that the arguments name.

    Raises:
        ValueError: none, or one that cannot be used; names it.
    """
    sets = [SupportSet.load(file) for file in args.supports]
    if args.support:
        sets.append(support_set_of(args.support))
    if not sets:
        raise ValueError("an example must be given by --support or --supports, got none")
    return merged(sets)


def read_thresholds(
    file: str | None, default: float, class_names: Sequence[str]
) -> tuple[float, ...]:
    """A score for each class: that of ``fewshot-d2 check --output``, or the default.

    Raises:
        ValueError: it is no such file, or a score is not in [0, 1].
    """
    scores: dict[str, Any] = {}
    if file:
        try:
            scores = json.loads(Path(file).read_text(encoding="utf-8"))["thresholds"]
            dict.items(scores)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{printable(file)} must be a file of thresholds, got: {error}"
            ) from error
    chosen = tuple(scores.get(name, default) for name in class_names)
    for name, score in zip(class_names, chosen, strict=True):
        if not isinstance(score, (int, float)) or not 0 <= score <= 1:
            raise ValueError(f"threshold of {name!r} must be in [0, 1], got {score!r}")
    return chosen


def table(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    """Plain text in columns; floats with two digits, a dash for NaN."""
    cells = [[_cell(value) for value in row] for row in rows]
    numbers = ["right" if _is_number(v) else "left" for v in (cells[0] if cells else [])]
    return tabulate(cells, headers=headers, disable_numparse=True, colalign=numbers or None)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.2f}"
    return printable(str(value))


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.replace(".", "", 1).isdigit()
