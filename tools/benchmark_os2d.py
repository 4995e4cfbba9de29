"""OS2D's heads against a straightforward form of the same: seconds, peak memory and differences, in one run.

The straightforward form takes all classes as one batch, resamples in float64 with the channels stacked along y, and
takes boxes from all 225 points, as the original does. Memory is what each form needs on top of its input, in a process
of its own.
"""

import argparse
import multiprocessing
import time

import torch
import torch.nn.functional as F
from high_water import high_water
from torch import Tensor, nn

from fewshot_d2.systems.os2d.geometry import ANCHOR, IDENTITY, SIDE, STRIDE
from fewshot_d2.systems.os2d.matchers import AlignedMatcher, Matches, unit_maps

FORMS = {"v1": ("simple", False), "v2": ("affine", True)}


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(600, 600), metavar=("H", "W"))
    parser.add_argument("--classes", type=int, default=15)
    parser.add_argument("--channels", type=int, default=1024, help="of the backbone's map")
    parser.add_argument("--chunk", type=int, default=8, help="classes matched at once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def straightforward(matcher: AlignedMatcher, cells: Tensor, features: Tensor) -> Matches:
    """The same as the matcher, written out."""
    features = features / (features.norm(dim=1, keepdim=True) + 1e-5)
    correlation = torch.einsum("kmc,chw->kmhw", cells, features[0])
    net = matcher.transform_net
    hidden = F.relu(correlation)
    hidden = hidden / (hidden.norm(dim=1, keepdim=True) + 1e-6)
    parameters = net.linear(net.conv(hidden))
    rows, _, height, width = parameters.shape
    n = height * width
    theta = parameters.permute(0, 2, 3, 1).reshape(rows * n, -1)
    if theta.shape[1] == 4:
        zero = torch.zeros_like(theta[:, 0])
        theta = torch.stack([theta[:, 0], zero, theta[:, 1], zero, theta[:, 2], theta[:, 3]], 1)
    matrices = theta.view(-1, 2, 3)
    if matcher.inverse:
        last = torch.tensor([0.0, 0.0, 1.0]).expand(len(matrices), 1, 3)
        matrices = torch.linalg.inv(torch.cat([matrices, last], dim=1))[:, :2]
    grid = F.affine_grid(matrices.contiguous(), (len(matrices), 1, SIDE, SIDE), align_corners=True)
    grid = grid.view(rows, height, width, SIDE, SIDE, 2)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    centre = torch.stack([x, y], dim=-1)[None, :, :, None, None]
    in_map = SIDE / 2 * grid + centre
    in_image = (ANCHOR / 2 * grid + STRIDE * centre).view(rows, n, SIDE * SIDE, 2)
    boxes = torch.cat([in_image.amin(2), in_image.amax(2)], dim=-1)
    corners = in_image.view(rows, n, SIDE, SIDE, 2)[:, :, [0, 0, 14, 14], [0, 14, 0, 14]].flatten(2)
    scores = _stacked(correlation, in_map)
    return Matches(scores, scores, boxes, corners)


def _stacked(correlation: Tensor, places: Tensor) -> Tensor:
    """Mean over the 121 inner points of a resampling in which the channels are one tall float64 image."""
    rows, channels, height, width = correlation.shape
    tall = correlation.double().reshape(rows, 1, channels * height, width)
    x = places[..., 0].clamp(0, width - 1).double()
    y = places[..., 1].clamp(0, height - 1).double()
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    channel = (column * SIDE + row).double()
    y = y + channel * height
    grid = torch.stack([x / (width - 1) * 2 - 1, y / (channels * height - 1) * 2 - 1], dim=-1)
    flat = grid.view(rows, height * width, SIDE * SIDE, 2)
    samples = F.grid_sample(tall, flat, padding_mode="border", align_corners=True)[:, 0]
    inner = torch.zeros(SIDE, SIDE, dtype=torch.float64)
    inner[2:-2, 2:-2] = 1 / 121
    return (samples * inner.flatten()).sum(dim=-1).float()


def chunked(matcher: AlignedMatcher, cells: Tensor, features: Tensor, chunk: int) -> Matches:
    """The matcher, a chunk of classes at a time as in the detector."""
    features = unit_maps(features)
    parts = [matcher({"cells": c}, features, [len(c)]) for c in cells.split(chunk)]
    return Matches(*(torch.cat(t) for t in zip(*(vars(p).values() for p in parts), strict=True)))


def make(form: str, args: argparse.Namespace) -> tuple[AlignedMatcher, Tensor, Tensor]:
    """A matcher whose alignments differ from the identity, classes and a query of random features."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    kind, inverse = FORMS[form]
    matcher = AlignedMatcher(form=kind, inverse=inverse, is_norm_frozen=False).eval()
    nn.init.normal_(matcher.transform_net.linear.weight, std=0.01)
    features = torch.rand(1, args.channels, -(-args.size[0] // STRIDE), -(-args.size[1] // STRIDE))
    maps = torch.rand(args.classes, args.channels, SIDE, SIDE)
    cells = matcher.encode(maps, (ANCHOR, ANCHOR))["cells"]
    assert len(IDENTITY[kind]) == len(matcher.transform_net.linear.bias)
    return matcher, cells, features


def _peak(name: str, form: str, args: argparse.Namespace, queue: multiprocessing.Queue) -> None:
    """Megabytes that one form adds to a process."""
    matcher, cells, features = make(form, args)
    before = high_water()
    with torch.no_grad():
        if name == "straightforward":
            straightforward(matcher, cells, features)
        else:
            chunked(matcher, cells, features, args.chunk)
    queue.put(high_water() - before)


def peak(name: str, form: str, args: argparse.Namespace) -> float:
    """``_peak`` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(name, form, args, queue))
    process.start()
    value = queue.get(timeout=300)
    process.join()
    return value


@torch.no_grad()
def main() -> None:
    """Print a line a form."""
    args = parse()
    print(
        f"{args.threads} threads, {args.classes} classes, {args.size[0]}x{args.size[1]}, best of {args.repeats}"
    )
    for form in FORMS:
        matcher, cells, features = make(form, args)
        forms = {
            "straightforward": lambda: straightforward(matcher, cells, features),  # noqa: B023
            "ours": lambda: chunked(matcher, cells, features, args.chunk),  # noqa: B023
        }
        seconds = {name: [] for name in forms}
        results = {name: run() for name, run in forms.items()}
        # Rounds, not blocks: slow spells of the machine then hit both alike.
        for _ in range(args.repeats):
            for name, run in forms.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        best = {name: min(times) for name, times in seconds.items()}
        memory = {name: peak(name, form, args) for name in forms}
        print(
            f"{form}  {best['straightforward']:.3f} s and {best['ours']:.3f} s, "
            f"ratio {best['straightforward'] / best['ours']:.2f}; "
            f"{memory['straightforward']:.0f} MB and {memory['ours']:.0f} MB"
        )
        theirs, ours = results["straightforward"], results["ours"]
        for name in ("scores", "boxes", "corners"):
            difference = (getattr(theirs, name) - getattr(ours, name)).abs().max()
            print(f"    largest difference of {name} {difference:.1e}")


if __name__ == "__main__":
    main()
