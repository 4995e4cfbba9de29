"""Excitation back-propagation: which places of a map made a unit of a later one respond.

The units of the later map share their weight among those of the earlier one as if each had won it by chance: a
convolution gives to an input in proportion to (input x positive weight). Works on any torch CNN as it is: the rule is
switched on around the forward pass and changes what autograd records, not the modules.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# A unit with less than this to share out gives nothing.
_EPSILON = 1e-10

_ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_SCALINGS = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "div_", "__truediv__"}
_NORMS = {"batch_norm", "group_norm", "instance_norm", "layer_norm"}
_ACTIVATIONS = {
    *("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_"),
    *("leaky_relu", "leaky_relu_", "elu", "elu_", "gelu", "silu", "mish", "hardswish"),
}


class ExcitationRule(TorchFunctionMode):
    """Context manager: forward passes inside record excitation instead of gradients.

    Convolutions share out as the module says, activations, norms and scalings (also a map times a gate of another
    shape) pass the weight on unchanged, and the sum of two maps of equal shape shares it in proportion to their
    positive parts, half and half where neither is positive. All other operations keep their gradient.

    Values are those of the plain forward pass. In-place operations return a new tensor, so that a map asked for is
    still what it was; code that drops what an in-place operation returns is not supported. ``excite`` goes back.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Replace the operations that have a rule."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "conv2d":
            return _conv(*args, **kwargs)
        if not args or not _is_map(args[0]):
            other_first = len(args) == 2 and _is_map(args[1]) and not kwargs
            if other_first and name in {"add", "mul"}:
                return self.__torch_function__(func, types, args[::-1])
            return func(*args, **kwargs)
        if name in _NORMS:
            return _Pass.apply(args[0], partial(_call, func, args[1:], kwargs))
        if name in _ACTIVATIONS:
            return _Pass.apply(args[0], partial(_call_on_copy, func, args[1:], kwargs))
        if len(args) == 2 and not kwargs:
            if name in _ADDITIONS and _is_map(args[1]) and args[0].shape == args[1].shape:
                return _Sum.apply(*args)
            if name in _SCALINGS:
                return _scale(func, *args)
        return func(*args, **kwargs)


def excite(outputs: Tensor, inputs: Tensor, starts: Tensor) -> Tensor:
    """Take the weight of several starts from a later map back to an earlier one.

    Args:
        outputs (Tensor[1, C, H, W]), inputs (Tensor[1, c, h, w]): maps of one forward pass under ``ExcitationRule``
            whose image required grad. The pass is freed by this.
        starts (Tensor[S, C, H, W]): not negative; where the weight of each of the S starts is at first.

    Returns:
        Tensor[S, c, h, w], not negative. The sum over a map is that of its start, less what fell on padding and on
        units that nothing excites.

    Raises:
        ValueError: the starts do not fit ``outputs``.
    """
    if len(outputs) != 1 or starts.shape[1:] != outputs.shape[1:]:
        raise ValueError(
            f"starts must be S maps like the one output, got {list(starts.shape)} for {list(outputs.shape)}"
        )
    (found,) = torch.autograd.grad(
        outputs, inputs, starts[:, None].to(outputs), is_grads_batched=True
    )
    return found[:, 0]


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.requires_grad


def _call(func: Callable, args: tuple, kwargs: dict, x: Tensor) -> Tensor:
    return func(x, *args, **kwargs)


def _call_on_copy(func: Callable, args: tuple, kwargs: dict, x: Tensor) -> Tensor:
    return func(x.clone(), *args, **kwargs)


def _scale(func: Callable, x: Tensor, other: Any) -> Tensor:
    """A map times anything that does not make it larger; the larger of two maps is the one that is scaled."""
    if isinstance(other, Tensor):
        shape = torch.broadcast_shapes(x.shape, other.shape)
        if shape != x.shape and shape == other.shape and "div" not in func.__name__:
            x, other = other, x
        if shape != x.shape or x.shape == other.shape:
            return func(x, other)
        other = other.detach()
    return _Pass.apply(x, partial(_call_on_copy, func, (other,), {}))


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d`` with the rule; the names are its."""
    if padding == "same":
        # torch puts the odd pixel at the end, which a number cannot say.
        steps = (dilation, dilation) if isinstance(dilation, int) else dilation
        totals = [d * (k - 1) for d, k in zip(steps, weight.shape[2:])]
        input = F.pad(input, [p for t in reversed(totals) for p in (t // 2, t - t // 2)])
    padding = 0 if isinstance(padding, str) else padding
    if not _is_map(input):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return _Conv.apply(input, weight, bias, (stride, padding, dilation, groups))


class _Conv(torch.autograd.Function):
    """Backward: x+ * conv_T(g / conv(x+, W+), W+) with x+ = x - min(x) of the image and W+ = relu(W)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        return F.conv2d(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        # The saved ones are part of the graph, which is not wanted here.
        x, weight = x.detach(), weight.detach().clamp(min=0)
        x = x - x.amin(dim=(1, 2, 3), keepdim=True)
        total = F.conv2d(x, weight, None, *ctx.settings)
        share = torch.where(total < _EPSILON, 0, 1 / total)
        back = torch.nn.grad.conv2d_input(x.shape, weight, grad * share, *ctx.settings)
        return x * back, None, None, None


class _Sum(torch.autograd.Function):
    """a + b; backward shares in proportion to the positive parts."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a + b

    @staticmethod
    def backward(ctx, grad: Tensor):
        a, b = (x.detach().clamp(min=0) for x in ctx.saved_tensors)
        share = torch.where(a + b < _EPSILON, 0.5, a / (a + b))
        return grad * share, grad * (1 - share)


class _Pass(torch.autograd.Function):
    """Any operation that keeps the shape; backward is the identity."""

    @staticmethod
    def forward(ctx, x: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:
        return operation(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None
