"""RepMet's distances, posteriors and losses: worked numbers, loops and another library."""

import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances as pml_distances
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners, reducers
from torch.testing import assert_close

from fewshot_d2.modeling.metric_learning import (
    detection_posteriors,
    hard_triplet_losses,
    margin_losses,
    mixture_log_posteriors,
    squared_distances,
)

SIGMA = 0.5


@pytest.fixture
def first():
    """Spec section 3.4, head vectors (i)."""
    embeddings = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.3, 0.1, 0], [0, 0, 1, 1], [-1, 0, 0, 0.2]])
    modes = torch.tensor(
        [[[2.0, 0, 0, 0], [0, 3, 0, 0]], [[0, 0, 1, 0], [0, 0, 1, 2]]], dtype=torch.float32
    )
    return squared_distances(embeddings, modes)


@pytest.fixture
def second():
    """Spec section 3.4, head vectors (ii)."""
    embeddings = torch.tensor([[1.0, 1, 0], [1, 0.2, 0], [0, 1, 0.1]])
    modes = torch.tensor([[[1.0, 0, 0], [0.8, 0.6, 0]], [[0, 1, 0], [0, 0.6, 0.8]]])
    return squared_distances(embeddings, modes)


def test_posteriors_are_those_of_the_spec(first):
    expected = [
        [1.000000, 0.018316, 0.0],
        [0.797579, 0.027857, 0.202421],
        [0.018316, 0.814430, 0.185570],
        [0.018316, 0.036944, 0.963056],
    ]
    posteriors = detection_posteriors(first, SIGMA)
    assert_close(posteriors, torch.tensor(expected), atol=2e-6, rtol=0)
    loss = F.cross_entropy(15 * posteriors, torch.tensor([0, 0, 1, 2]))
    assert loss.item() == pytest.approx(5.7813e-5, rel=2e-3)


def test_margin_and_mixture_are_those_of_the_spec(second):
    nearest = second.amin(dim=2)
    assert_close(nearest[:, 0], torch.tensor([0.020101, 0.038839, 0.805955]), atol=2e-6, rtol=0)
    assert_close(nearest[:, 1], torch.tensor([0.585786, 1.607768, 0.009926]), atol=2e-6, rtol=0)
    labels = torch.zeros(3, dtype=torch.long)
    assert_close(
        margin_losses(second, labels, 0.5), torch.tensor([0, 0, 1.296030]), atol=2e-6, rtol=0
    )
    plain = margin_losses(second.sqrt(), labels, 0.5)
    assert_close(plain, torch.tensor([0, 0, 1.298122]), atol=2e-6, rtol=0)
    chances = mixture_log_posteriors(second, SIGMA).exp()
    assert_close(chances[:, 0], torch.tensor([0.756092, 0.958428, 0.147929]), atol=2e-6, rtol=0)


@pytest.fixture
def problem(rng):
    """Embeddings, labels and representatives of 5 classes with 3 modes each, in double precision."""
    embeddings = torch.randn(20, 6, generator=rng, dtype=torch.float64)
    modes = torch.randn(5, 3, 6, generator=rng, dtype=torch.float64)
    return embeddings, torch.arange(20) % 5, modes


def naive_distances(embeddings, modes):
    def unit(vector):
        return vector / math.sqrt(sum(float(x) ** 2 for x in vector))

    rows = [
        [[((unit(e) - unit(m)) ** 2).sum().item() for m in of_class] for of_class in modes]
        for e in embeddings
    ]
    return torch.tensor(rows, dtype=torch.float64)


def test_functions_equal_loops(problem):
    embeddings, labels, modes = problem
    distances = squared_distances(embeddings, modes)
    loops = naive_distances(embeddings, modes)
    assert_close(distances, loops, atol=1e-12, rtol=1e-9)
    posteriors = detection_posteriors(distances, SIGMA)
    log_chances, margins = (
        mixture_log_posteriors(distances, SIGMA),
        margin_losses(distances, labels, 0.7),
    )
    for r in range(len(embeddings)):
        p = [[math.exp(-d / (2 * SIGMA**2)) for d in of_class] for of_class in loops[r].tolist()]
        q = [max(of_class) + 1e-7 for of_class in p]
        assert posteriors[r].tolist() == pytest.approx([*q, 1 + 1e-7 - max(q)], abs=1e-9)
        total = sum(map(sum, p))
        chances = [sum(of_class) / total for of_class in p]
        assert log_chances[r].exp().tolist() == pytest.approx(chances, rel=1e-9)
        true = min(loops[r, labels[r]]).item()
        wrong = min(min(row).item() for k, row in enumerate(loops[r]) if k != labels[r])
        assert margins[r].item() == pytest.approx(max(0, true - wrong + 0.7), abs=1e-9)


def test_mixture_cross_entropy_equals_the_librarys_nca(problem):
    embeddings, labels, modes = problem
    loss = F.nll_loss(mixture_log_posteriors(squared_distances(embeddings, modes), SIGMA), labels)
    nca = pml_losses.NCALoss(
        softmax_scale=1 / (2 * SIGMA**2),
        distance=pml_distances.LpDistance(power=2),
        reducer=reducers.MeanReducer(),
    )
    mode_labels = torch.repeat_interleave(torch.arange(5), 3)
    expected = nca(embeddings, labels, ref_emb=modes.flatten(0, 1), ref_labels=mode_labels)
    assert_close(loss, expected)


@pytest.mark.parametrize("power", [1, 2])
def test_margin_equals_the_librarys_triplets(problem, power):
    embeddings, labels, modes = problem
    distances = squared_distances(embeddings, modes)
    loss = margin_losses(distances if power == 2 else distances.sqrt(), labels, 0.5).mean()
    distance = pml_distances.LpDistance(power=power)
    references = modes.flatten(0, 1), torch.repeat_interleave(torch.arange(5), 3)
    miner = miners.BatchEasyHardMiner(pos_strategy="easy", neg_strategy="hard", distance=distance)
    triplets = pml_losses.TripletMarginLoss(
        margin=0.5, distance=distance, reducer=reducers.MeanReducer()
    )
    found = miner(embeddings, labels, *references)
    expected = triplets(embeddings, labels, found, *references)
    assert loss > 0
    assert_close(loss, expected)


def test_empty_modes_take_no_part(problem):
    embeddings, labels, modes = problem
    filled = torch.ones(5, 3, dtype=torch.bool)
    filled[:, 2] = False
    masked, fewer = (
        squared_distances(embeddings, modes, filled),
        squared_distances(embeddings, modes[:, :2]),
    )
    assert_close(detection_posteriors(masked, SIGMA), detection_posteriors(fewer, SIGMA))
    assert_close(mixture_log_posteriors(masked, SIGMA), mixture_log_posteriors(fewer, SIGMA))
    assert_close(margin_losses(masked, labels, 0.5), margin_losses(fewer, labels, 0.5))


def test_gradient_reaches_the_nearest_mode_of_each_class_only(problem):
    embeddings, _, modes = problem
    modes.requires_grad_()
    filled = torch.ones(5, 3, dtype=torch.bool)
    filled[0, 0] = False
    distances = squared_distances(embeddings[:1], modes, filled)
    detection_posteriors(distances, SIGMA)[0, :-1].sum().backward()
    reached = modes.grad.abs().sum(dim=2) > 0
    assert torch.equal(reached, F.one_hot(distances[0].argmin(dim=1), 3).bool())
    assert torch.isfinite(modes.grad).all()


def test_distances_in_mixed_precision_are_exact(rng):
    embeddings = torch.randn(6, 32, generator=rng)
    modes = embeddings[:2, None] + 0.01 * torch.randn(2, 3, 32, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = squared_distances(embeddings, modes)
    assert mixed.dtype == torch.float32
    assert_close(mixed, squared_distances(embeddings, modes), atol=0, rtol=0)
    assert 0 < mixed[0, 0].max() < 1e-3


def test_no_embedding_and_no_other_class(problem):
    embeddings, _, modes = problem
    none = squared_distances(embeddings[:0], modes)
    assert detection_posteriors(none, SIGMA).shape == (0, 6)
    alone = squared_distances(embeddings, modes[:1])
    assert (margin_losses(alone, torch.zeros(20, dtype=torch.long), 0.5) == 0).all()


def test_hard_triplets_equal_another_library(rng):
    embeddings = torch.randn(20, 5, generator=rng)
    labels = torch.randint(0, 4, (20,), generator=rng)
    distance = pml_distances.LpDistance(power=2)
    triplets = miners.BatchHardMiner(distance=distance)(embeddings, labels)
    loss = pml_losses.TripletMarginLoss(
        margin=0.5, distance=distance, reducer=reducers.MeanReducer()
    )
    expected = loss(embeddings, labels, triplets)
    assert_close(hard_triplet_losses(embeddings, labels, 0.5, background=9).mean(), expected)


def test_background_is_no_anchor_but_an_other():
    embeddings = torch.tensor([[1.0, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]])
    # Two of class 0 and two of background, whose pair is no positive one.
    losses = hard_triplet_losses(embeddings, torch.tensor([0, 0, 7, 7]), 0.5, background=7)
    own = 2 - 2 * 0.8
    expected = [own - (2 - 2 * 0.6) + 0.5, own - (2 - 2 * 0.96) + 0.5]
    assert_close(losses, torch.tensor(expected).clamp(min=0))
    alone = hard_triplet_losses(embeddings[:2], torch.tensor([0, 1]), 0.5, background=7)
    assert alone.shape == (0,)
    assert hard_triplet_losses(embeddings[:0], torch.zeros(0), 0.5, background=7).shape == (0,)
