"""Checkpoints: written atomically, read without running code, refused when they are another system's."""

import logging
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from .files import dataset_path, write_tensors, write_text
from .pickles import load_arrays

logger = logging.getLogger(__name__)


class FewShotCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, made safe against crashes, foreign code and mix-ups."""

    def __init__(self, model: nn.Module, save_dir: str = "", **kwargs: Any):
        """Arguments as in detectron2; the system is the class of ``model``."""
        super().__init__(model, save_dir, **kwargs)
        self.system = type(self.model).__name__

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name``.pth and then point ``last_checkpoint`` to it.

        Raises:
            OSError: disk full or not writable; older checkpoints stay as they were.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict(), "system": self.system}
        content.update({key: part.state_dict() for key, part in self.checkpointables.items()})
        content.update(kwargs)
        path = Path(self.save_dir) / f"{name}.pth"
        logger.info("Saving checkpoint to %s", path)
        write_tensors(path, content)
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the name of the newest checkpoint, atomically."""
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = read_checkpoint(filename)
        content = content if "model" in content else {"model": content}
        owner = content.get("system", self.system)
        if owner != self.system:
            raise ValueError(
                f"{filename} must be a checkpoint of {self.system}, got one of {owner}"
            )
        _check_overlap(filename, content["model"], self.model, heuristic="__author__" in content)
        if "system" in content:
            _check_shapes(filename, content["model"], self.model)
        return content


def load_weights(
    model: nn.Module,
    path: str,
    convert: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]]
    | None = None,
) -> None:
    """Load a local state dict of a part of a detector exactly; an empty path leaves the random initialisation.

    A relative path is below DETECTRON2_DATASETS.

    Args:
        convert: makes a state dict of the model of that of the file and the model's own.

    Raises:
        ValueError: missing file or keys that do not fit; names the file.
    """
    if not path:
        return
    if not dataset_path(path).is_file():
        raise ValueError(f"backbone weights must be a local file, got {dataset_path(path)}")
    state = torch.load(dataset_path(path), map_location="cpu", weights_only=True)
    try:
        state = state.get("model", state)
        model.load_state_dict(state if convert is None else convert(state, model.state_dict()))
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must fit {type(model).__name__}, got: {error}") from error


def read_checkpoint(filename: str, *, lazy: bool = False) -> dict[str, Any]:
    """What a checkpoint or a model zoo's file holds, read without running code.

    Args:
        lazy: leave tensors on the disk until they are used, where the format allows it: for a look at the rest.

    Raises:
        ValueError: the file cannot be read or holds no dict; names it.
    """
    try:
        content = _read(filename, lazy)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{filename} must be a readable checkpoint, got: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{filename} must hold a dict, got {type(content).__name__}")
    return dict(content)


def _read(filename: str, lazy: bool) -> Any:
    if not filename.endswith(".pkl"):
        mmap = lazy and zipfile.is_zipfile(filename)
        return torch.load(filename, map_location="cpu", weights_only=True, mmap=mmap)
    content = load_arrays(filename)
    if not ("model" in content and "__author__" in content):
        content = {"model": content.get("blobs", content), "__author__": "Caffe2"}
    return {**content, "matching_heuristics": True}


def _check_overlap(filename: str, state: Mapping, model: nn.Module, *, heuristic: bool) -> None:
    """Raise where not one weight of the file belongs to the model; detectron2 would only warn."""
    own = model.state_dict()
    names = {name.removeprefix("module.") for name in state}
    if not heuristic and own and not names & set(own):
        raise ValueError(
            f"{filename} must hold weights of {type(model).__name__}, got {len(names)} names that it "
            f"does not have, for example {sorted(names)[:2]}; it expects for example {sorted(own)[:2]}"
        )


def _check_shapes(filename: str, state: Mapping, model: nn.Module) -> None:
    """Raise where our own checkpoint is of another width; detectron2 would leave random weights there."""
    own = model.state_dict()
    wrong = [n for n, tensor in state.items() if n in own and own[n].shape != tensor.shape]
    if wrong:
        raise ValueError(
            f"{filename} must fit the config's {type(model).__name__}, got {len(wrong)} weights of another "
            f"shape, for example {wrong[0]}: {tuple(state[wrong[0]].shape)} instead of {tuple(own[wrong[0]].shape)}"
        )
