"""Time and peak memory of SILCO's attention in training: as it is, and with the attention matrix in memory.

Measured are the six spatial similarity modules with their GCNs at the sizes of VGG16 and 300 pixels, forward and
backward, gradients of the maps included; trunk, fusion convolutions and heads are not. Memory is that of a process of
its own for each form, and how much of it is more than the process had with weights and maps.
"""

import argparse
import multiprocessing
import time

import torch
from high_water import high_water
from torch import Tensor, nn

from fewshot_d2.systems.silco.reweighting import FeatureReweighting
from fewshot_d2.systems.silco.similarity import SimilarityFusion

SCALES = ((512, 38), (1024, 19), (512, 10), (256, 5), (256, 3), (256, 1))


class MatmulFusion(SimilarityFusion):
    """The straightforward form."""

    def added(
        self, theta: Tensor, keys: Tensor, values: Tensor, weights: Tensor, mask: Tensor | None
    ) -> Tensor:
        """As in ``SimilarityFusion``, without a mask."""
        return self.weighted(self.attention(theta, keys) @ values, weights)


FORMS = {"as it is": SimilarityFusion, "matmul": MatmulFusion}


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def modules(form: str) -> nn.ModuleList:
    """One module a scale, with weights by the seed."""
    torch.manual_seed(0)
    result = nn.ModuleList()
    for channels, _ in SCALES:
        weights = FeatureReweighting(channels, blocks=5, width=96, dropout=0.3)
        module = FORMS[form](
            channels,
            dropout=0.5,
            is_global=False,
            reweighting=weights,
            normalize_weights=False,
        )
        nn.init.normal_(module.out.weight, std=0.02)
        result.append(module)
    return result.train()


def maps_of(batch: int, shots: int) -> list[tuple[Tensor, Tensor]]:
    """Query and support maps of each scale, as a trunk gives them."""
    torch.manual_seed(1)
    return [
        (
            torch.randn(batch, c, side, side).requires_grad_(),
            torch.randn(batch, shots, c, side, side).requires_grad_(),
        )
        for c, side in SCALES
    ]


def step(scales: nn.ModuleList, maps: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Forward and backward through all scales; the enhanced maps."""
    is_shot = torch.ones(maps[0][1].shape[:2], dtype=torch.bool)
    torch.manual_seed(2)
    enhanced = [
        module(module.describe(query), module.encode(supports, is_shot), is_shot)
        for module, (query, supports) in zip(scales, maps, strict=True)
    ]
    sum(m.square().mean() for m in enhanced).backward()
    return enhanced


def peak_memory(arguments: tuple[str, int, int, int]) -> tuple[float, float]:
    """(with weights and maps only, at the highest) in GiB, of one step in this process."""
    form, batch, shots, threads = arguments
    torch.set_num_threads(threads)
    scales, maps = modules(form), maps_of(batch, shots)
    before = high_water()
    step(scales, maps)
    return before / 2**10, high_water() / 2**10


def main() -> None:
    """Print seconds, memory and the largest difference of the two."""
    args = parse()
    context = multiprocessing.get_context("spawn")
    memory = {}
    for form in FORMS:
        with context.Pool(1) as pool:
            (memory[form],) = pool.map(peak_memory, [(form, args.batch, args.shots, args.threads)])
    torch.set_num_threads(args.threads)
    scales, maps = {form: modules(form) for form in FORMS}, maps_of(args.batch, args.shots)
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    busy_seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    # Rounds, not blocks: slow spells of the machine then hit both alike. The first one warms up.
    for _ in range(args.repeats + 1):
        outputs = {}
        for form in FORMS:
            start, busy = time.perf_counter(), time.process_time()
            outputs[form] = [m.detach() for m in step(scales[form], maps)]
            seconds[form].append(time.perf_counter() - start)
            busy_seconds[form].append(time.process_time() - busy)
    print(f"{args.threads} threads, batch {args.batch}, {args.shots} shots, best of {args.repeats}")
    for form in FORMS:
        before, peak = memory[form]
        wall, busy = min(seconds[form][1:]), min(busy_seconds[form][1:])
        print(
            f"{form:9s} {wall:6.2f} s ({busy:.2f} s of all threads), peak {peak:.2f} GiB, {peak - before:.2f} GiB "
            "of it in the step"
        )
    pairs = zip(*outputs.values(), strict=True)
    print(f"largest difference {max((a - b).abs().max().item() for a, b in pairs):.1e}")


if __name__ == "__main__":
    main()
