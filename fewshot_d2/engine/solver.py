"""What turns losses into steps: optimizers by key, global gradient clipping, several processes."""

from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_OPTIMIZERS = {"SGD": torch.optim.SGD, "ADAMW": torch.optim.AdamW}
# Of the backbone, and of a box head that is the end of a trained classifier.
BOTTOM_UP = "bottom_up."


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SOLVER.OPTIMIZER over groups split by (bottom-up or not, decayed or not).

    Groups of the bottom-up are marked ``"bottom_up": True`` for the heads-only warm-up.

    Raises:
        ValueError: unknown optimizer name.
    """
    name = cfg.SOLVER.OPTIMIZER
    if name not in _OPTIMIZERS:
        raise ValueError(f"SOLVER.OPTIMIZER must be one of {sorted(_OPTIMIZERS)}, got {name!r}")
    options: dict[str, Any] = {"lr": cfg.SOLVER.BASE_LR}
    if name == "SGD":
        options.update(momentum=cfg.SOLVER.MOMENTUM, nesterov=cfg.SOLVER.NESTEROV)
    optimizer = _OPTIMIZERS[name](parameter_groups(cfg, model), **options)
    if cfg.SOLVER.CLIP_GLOBAL_NORM > 0:
        clip_global_norm(optimizer, cfg.SOLVER.CLIP_GLOBAL_NORM)
    return optimizer


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters by (bottom-up or not, decayed or not); norms and biases are not decayed."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # One axis: biases and the affine of norms.
            key = (BOTTOM_UP in f"{name}.", parameter.dim() > 1)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "bottom_up": bottom_up,
            "lr": cfg.SOLVER.BASE_LR * (cfg.SOLVER.BACKBONE_MULTIPLIER if bottom_up else 1.0),
            "weight_decay": cfg.SOLVER.WEIGHT_DECAY if decayed else cfg.SOLVER.WEIGHT_DECAY_NORM,
        }
        for (bottom_up, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def clip_global_norm(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Before every step scale all gradients together so that their joint L2 norm is at most ``max_norm``.

    A hook of the optimizer runs after AMP has unscaled the gradients; detectron2's own clipping looks at each
    parameter by itself.
    """

    def clip(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # A group that stands still must not take its share of the norm.
        moving = [group for group in optimizer.param_groups if group["lr"] > 0]
        parameters = [p for group in moving for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, max_norm)

    optimizer.register_step_pre_hook(clip)


def distributed(model: nn.Module, **options: Any) -> nn.Module:
    """Wrap for several processes, on CUDA or (gloo) on the CPU; ``options`` of DistributedDataParallel."""
    if comm.get_world_size() == 1:
        return model
    devices = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, **options)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that ``distributed`` may have wrapped."""
    return getattr(model, "module", model)


def average_buffers(model: nn.Module) -> None:
    """Give all processes the mean of their running statistics, which they gather from other batches."""
    if comm.get_world_size() == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= comm.get_world_size()
