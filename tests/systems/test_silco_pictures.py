"""Figure 4: the map of a query without what makes supports count differently."""

import torch
from factories import random_support
from silco_cases import SIDE, awake, small_silco
from torch.testing import assert_close

from fewshot_d2 import SupportSet


def described_query(model, rng):
    image = torch.randint(0, 256, (3, SIDE, SIDE), generator=rng, dtype=torch.uint8)
    return model.describe_queries([{"image": image, "height": SIDE, "width": SIDE}])[0]


@torch.no_grad()
def test_map_with_equal_weights_is_that_of_a_model_whose_weights_are_equal(rng):
    model = awake(small_silco()).eval()
    shots = [random_support(rng) for _ in range(3)]
    query, support_set = described_query(model, rng), SupportSet([1], ["a"], [shots])
    support = model.encode_support([support_set])
    shown = model.explain(query, support)
    assert not torch.allclose(shown["with equal weights"], shown["enhanced map"])
    # The sum of the weights stays: a larger sum alone would make maps larger.
    for name in model.fusions:
        total = support.tensors[f"{name}.weights"].sum()
        support.tensors[f"{name}.weights"].fill_(total / 3)
    again = model.explain(query, support)
    assert_close(again["enhanced map"], shown["with equal weights"])
    assert_close(again["enhanced map"], again["with equal weights"])


@torch.no_grad()
def test_padded_supports_stay_without_weight(rng):
    model = awake(small_silco()).eval()
    one, two = [random_support(rng)], [random_support(rng) for _ in range(2)]
    both = model.encode_support([SupportSet([1, 2], ["a", "b"], [one, two])])
    alone = model.encode_support([SupportSet([1], ["a"], [one])])
    query = described_query(model, rng)
    actual, expected = (model.explain(query, s[[0]])["with equal weights"] for s in (both, alone))
    assert_close(actual, expected)


@torch.no_grad()
def test_only_models_with_weights_show_it(rng):
    model = awake(small_silco()).eval()
    for fusion in model.fusions.values():
        fusion.reweighting = None
    support = model.encode_support([SupportSet([1], ["a"], [[random_support(rng)]])])
    assert "with equal weights" not in model.explain(described_query(model, rng), support)
