"""Spatial similarity and feature reweighting against loops over positions, supports and edges."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fewshot_d2.systems.silco.reweighting import FeatureReweighting, LearnedAdjacency
from fewshot_d2.systems.silco.similarity import (
    PooledFusion,
    SimilarityFusion,
    standardized,
)

CHANNELS, HALF = 6, 3


def fusion(*, zero=False, temperature=0.0, **options):
    torch.manual_seed(0)
    plain = {"dropout": 0.0, "is_global": False, "reweighting": None, "normalize_weights": False}
    module = SimilarityFusion(CHANNELS, **{**plain, **options}, temperature=temperature)
    if temperature:
        # As after training.
        nn.init.normal_(module.phi.weight)
    if not zero:
        nn.init.normal_(module.out.weight)
        nn.init.normal_(module.out.bias)
    return module


def enhanced(module, query, maps, is_shot=None):
    """One pair a query map."""
    is_shot = torch.ones(maps.shape[:2], dtype=torch.bool) if is_shot is None else is_shot
    return module(module.describe(query), module.encode(maps, is_shot), is_shot)


def maps_of(rng, pairs=2, shots=3):
    query = torch.randn(pairs, CHANNELS, 3, 2, generator=rng)
    return query, torch.randn(pairs, shots, CHANNELS, 2, 4, generator=rng)


def applied(layer, vector):
    """A 1x1 convolution at one place, with Python numbers."""
    weight, bias = layer.weight.flatten(1).tolist(), layer.bias.tolist()
    return [
        sum(w * v for w, v in zip(row, vector, strict=True)) + b
        for row, b in zip(weight, bias, strict=True)
    ]


def naive_addition(module, query, places, temperature=0.0):
    """What support places (a list of vectors) add to one query place (spec A3), by products or by cosines."""
    theta, logits = applied(module.theta, query), []
    for place in places:
        phi = applied(module.phi, place)
        product = sum(a * b for a, b in zip(theta, phi, strict=True))
        length = math.hypot(*theta) * math.hypot(*phi)
        logits.append(product / length / temperature if temperature else product / math.sqrt(HALF))
    exps = [math.exp(logit - max(logits)) for logit in logits]
    values = [applied(module.g, place) for place in places]
    attended = [
        sum(e * v[c] for e, v in zip(exps, values, strict=True)) / sum(exps) for c in range(HALF)
    ]
    mean = sum(attended) / HALF
    deviation = math.sqrt(sum((y - mean) ** 2 for y in attended) / (HALF - 1))
    return applied(module.out, [max((y - mean) / (deviation + 1e-6), 0.0) for y in attended])


def places_of(features):
    """Vectors of a map (C, h, w), row by row."""
    return [
        features[:, y, x].tolist()
        for y in range(features.shape[1])
        for x in range(features.shape[2])
    ]


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize("is_global", [False, True])
def test_equals_loops(rng, is_global, temperature):
    module = fusion(is_global=is_global, temperature=temperature)
    query, maps = maps_of(rng)
    assert (query < 0).any() and (maps < 0).any()
    result = enhanced(module, query, maps)
    for p in range(2):
        supports = [places_of(m) for m in maps[p]]
        if is_global:
            supports = [[place for places in supports for place in places]]
        for y in range(3):
            for x in range(2):
                q = query[p, :, y, x].tolist()
                added = [naive_addition(module, q, places, temperature) for places in supports]
                mean = torch.tensor(added).mean(dim=0)
                assert_close(result[p, :, y, x], torch.tensor(q) + mean, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_global_equals_one_support_of_all_places(rng):
    query, maps = maps_of(rng, shots=3)
    side_by_side = torch.cat(list(maps.unbind(1)), dim=-1)[:, None]
    assert side_by_side.shape == (2, 1, CHANNELS, 2, 12)
    assert_close(
        enhanced(fusion(is_global=True), query, maps), enhanced(fusion(), query, side_by_side)
    )


@torch.no_grad()
@pytest.mark.parametrize("is_global", [False, True])
def test_is_the_identity_at_first(rng, is_global):
    query, maps = maps_of(rng, shots=4)
    module = fusion(zero=True, is_global=is_global).eval()
    assert_close(enhanced(module, query, maps), query)
    # With a GCN the query is scaled by the sum of the weights, unless that is 1.
    if not is_global:
        weights = FeatureReweighting(CHANNELS, blocks=1, width=4, dropout=0.0)
        scaled = fusion(zero=True, reweighting=weights)
        total = weights(maps.mean(dim=(3, 4)), torch.ones(2, 4, dtype=torch.bool)).sum(dim=1)
        assert_close(enhanced(scaled, query, maps), total[:, None, None, None] * query)
        normal = fusion(zero=True, reweighting=weights, normalize_weights=True)
        assert_close(enhanced(normal, query, maps), query)


def test_weights_that_are_as_good_as_zero_are_no_division_by_it(rng):
    """Neither forwards nor backwards."""

    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.full((2, 3), -200.0))

        def forward(self, nodes, is_shot):
            return self.logits.sigmoid()

    query, maps = maps_of(rng)
    module = fusion(reweighting=Nothing(), normalize_weights=True)
    result = enhanced(module, query, maps)
    (result * torch.randn(result.shape, generator=rng) * 100).sum().backward()
    assert result.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)
    assert module.reweighting.logits.grad is not None


def test_attention_by_cosines_looks_at_what_looks_alike(rng):
    """Of supports of one direction each, a cell attends most to its own; as a rule of no training at all."""
    torch.manual_seed(1)
    module = SimilarityFusion(
        64,
        dropout=0.0,
        is_global=False,
        reweighting=None,
        normalize_weights=False,
        temperature=0.06,
    )
    assert module.theta.weight.equal(module.phi.weight) and module.theta.bias.equal(module.phi.bias)
    assert module.theta.weight is not module.phi.weight
    cells = nn.functional.normalize(torch.randn(1, 64, 3, 3, generator=rng), dim=1)
    keys = module.encode(cells[:, None], torch.ones(1, 1, dtype=torch.bool))["keys"]
    attention = module.attention(module.describe(cells)["theta"], keys)[0, 0]
    assert attention.argmax(dim=1).tolist() == list(range(9))


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize("is_global", [False, True])
def test_missing_supports_count_nothing(rng, is_global, temperature):
    query, maps = maps_of(rng, shots=3)
    module = fusion(is_global=is_global, temperature=temperature)
    is_shot = torch.tensor([[True, True, True], [True, False, False]])
    maps[1, 1:] = 100.0
    result = enhanced(module, query, maps, is_shot)
    assert_close(result[0], enhanced(module, query[:1], maps[:1])[0])
    assert_close(result[1], enhanced(module, query[1:], maps[1:, :1])[0])


@torch.no_grad()
def test_pooled_baseline_adds_the_mean_of_the_supports(rng):
    query, maps = maps_of(rng)
    is_shot = torch.tensor([[True, True, True], [True, True, False]])
    result = enhanced(PooledFusion(), query, maps, is_shot)
    for p, number in enumerate((3, 2)):
        pooled = [[sum(c.flatten().tolist()) / 8 for c in m] for m in maps[p, :number]]
        vector = torch.tensor(pooled).mean(dim=0)
        assert_close(result[p], query[p] + vector[:, None, None], atol=1e-5, rtol=1e-4)


def test_dropout_is_of_the_addition_alone(rng):
    query, maps = maps_of(rng)
    assert_close(enhanced(fusion(dropout=1.0).train(), query, maps), query)


@torch.no_grad()
@pytest.mark.parametrize("is_global", [False, True])
def test_dropout_is_active_in_training_alone(rng, is_global):
    query, maps = maps_of(rng)
    weights = FeatureReweighting(CHANNELS, blocks=2, width=4, dropout=0.9)
    options = {"is_global": is_global, "reweighting": None if is_global else weights}
    module = fusion(dropout=0.9, **options)
    first, second = (enhanced(module.train(), query, maps) for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (enhanced(module.eval(), query, maps) for _ in range(2))
    assert torch.equal(first, second)
    assert_close(first, enhanced(fusion(dropout=0.0, **options).train(False), query, maps))


@torch.no_grad()
def test_dropout_of_edges_is_after_the_first_layer_alone(rng):
    """Without anything of that layer edges are alike, and what follows is handed on whole."""
    torch.manual_seed(0)
    module = LearnedAdjacency(7, 4, dropout=1.0)
    nodes, is_shot = torch.randn(1, 3, 7, generator=rng), torch.ones(1, 3, dtype=torch.bool)
    seen = []
    for layer in module.layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    edges = module.train()(nodes, is_shot)
    assert_close(edges, (1 - torch.eye(3))[None] / 2)
    assert seen[0][1].any() and not seen[1][0].any()
    for (_, before), (after, _) in zip(seen[1:], seen[2:], strict=False):
        assert_close(after, torch.nn.functional.leaky_relu(before, 0.01))
    assert (module.eval()(nodes, is_shot) - edges).abs().max() > 1e-4


def test_standardized_constant_tokens_are_zero_with_finite_gradients():
    tokens = torch.full((2, 5), 3.0, requires_grad=True)
    result = standardized(tokens)
    result.sum().backward()
    assert not result.any() and torch.isfinite(tokens.grad).all()


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize("is_global", [False, True])
def test_attention_for_pictures_is_that_of_the_module(rng, is_global, temperature):
    module = fusion(is_global=is_global, temperature=temperature)
    query, maps = maps_of(rng)
    encoded = module.encode(maps, torch.ones(2, 3, dtype=torch.bool))
    looked_at = module.attention(module.describe(query)["theta"], encoded["keys"])
    assert looked_at.shape == (2, 3, 6, 8)
    total = looked_at.sum(dim=3)
    assert_close(
        total.sum(dim=1) if is_global else total,
        torch.ones(2, 6) if is_global else torch.ones(2, 3, 6),
    )
    attended = looked_at @ encoded["values"]
    if is_global:
        attended = attended.sum(dim=1, keepdim=True)
    similar = module.out(standardized(attended).relu()).mean(dim=1)
    expected = query + similar.transpose(1, 2).view_as(query)
    assert_close(enhanced(module, query, maps), expected, atol=1e-5, rtol=1e-4)


def leaky(x):
    return x if x > 0 else 0.01 * x


def naive_adjacency(module, nodes, number):
    rows = []
    for i in range(number):
        logits = []
        for j in range(number):
            x = [abs(a - b) for a, b in zip(nodes[i], nodes[j], strict=True)]
            for layer in module.layers:
                x = [leaky(value) for value in applied(layer, x)]
            logits.append(applied(module.last, x)[0] - (1e8 if i == j else 0))
        exps = [math.exp(logit - max(logits)) for logit in logits]
        rows.append([e / sum(exps) for e in exps])
    return rows


def naive_weights(module, nodes):
    number, out = len(nodes), [[] for _ in nodes]
    for adjacency, convolution in zip(module.adjacencies, module.convolutions, strict=True):
        nodes = [[*node, *map(leaky, new)] for node, new in zip(nodes, out, strict=True)]
        edges = naive_adjacency(adjacency, nodes, number)
        out = []
        for i in range(number):
            neighbours = [
                sum(edges[i][j] * nodes[j][f] for j in range(number)) for f in range(len(nodes[i]))
            ]
            out.append(applied(convolution, [*nodes[i], *neighbours]))
    return [1 / (1 + math.exp(-value)) for (value,) in out]


@torch.no_grad()
@pytest.mark.parametrize("shots", [1, 2, 4])
def test_weights_equal_loops(rng, shots):
    torch.manual_seed(1)
    module = FeatureReweighting(5, blocks=2, width=4, dropout=0.3).eval()
    pooled = 3 * torch.randn(2, shots, 5, generator=rng)
    weights = module(pooled, torch.ones(2, shots, dtype=torch.bool))
    expected = [naive_weights(module, nodes) for nodes in pooled.tolist()]
    assert_close(weights, torch.tensor(expected), atol=1e-5, rtol=1e-4)
    assert ((weights > 0) & (weights < 1)).all()


@torch.no_grad()
@pytest.mark.parametrize("shots", [1, 2, 5])
def test_rows_sum_to_one_without_an_edge_to_itself(rng, shots):
    torch.manual_seed(0)
    module = LearnedAdjacency(7, 4, 0.0)
    nodes = torch.randn(2, shots, 7, generator=rng)
    edges = module(nodes, torch.ones(2, shots, dtype=torch.bool))
    assert_close(edges.sum(dim=2), torch.ones(2, shots))
    if shots > 1:
        assert not edges.diagonal(dim1=1, dim2=2).any()
        assert edges.std() > 1e-3, "edges that are all alike would show nothing"
    else:
        assert edges.tolist() == [[[1.0]], [[1.0]]]


@torch.no_grad()
def test_no_edge_leads_to_a_missing_support(rng):
    torch.manual_seed(0)
    module = FeatureReweighting(5, blocks=2, width=4, dropout=0.0)
    pooled = torch.randn(1, 4, 5, generator=rng)
    is_shot = torch.tensor([[True, True, False, False]])
    assert_close(module(pooled, is_shot)[:, :2], module(pooled[:, :2], is_shot[:, :2]))
    alone = module(pooled, torch.tensor([[True, False, False, False]]))
    assert 0 < alone[0, 0] < 1 and not alone[0, 1:].any()


def test_widths_and_numbers_of_weights_are_the_spec_s():
    """Spec A3 and A4: 3.55 and 8.06 million for six scales."""
    similarity = reweighting = 0
    for channels in (512, 1024, 512, 256, 256, 256):
        weights = FeatureReweighting(channels, blocks=5, width=96, dropout=0.3)
        assert [c.in_features for c in weights.convolutions] == [
            2 * (channels + 48 * block) for block in range(6)
        ]
        assert [c.out_features for c in weights.convolutions] == [48] * 5 + [1]
        layers = [layer.out_features for layer in weights.adjacencies[0].layers]
        assert layers == [192, 192, 96, 96]
        reweighting += sum(p.numel() for p in weights.parameters())
        module = SimilarityFusion(
            channels, dropout=0.5, is_global=False, reweighting=None, normalize_weights=False
        )
        similarity += sum(p.numel() for p in module.parameters())
    assert round(similarity / 1e6, 2) == 3.55 and round(reweighting / 1e6, 2) == 8.06


def test_gradients_reach_everything(rng):
    weights = FeatureReweighting(CHANNELS, blocks=2, width=4, dropout=0.3)
    module = fusion(reweighting=weights).train()
    query, maps = maps_of(rng, shots=4)
    enhanced(module, query, maps).square().sum().backward()
    for name, parameter in module.named_parameters():
        # A softmax does not see what is added to all of its logits.
        if not name.endswith(("phi.bias", "last.bias")):
            assert parameter.grad.any(), name
        assert torch.isfinite(parameter.grad).all()


def cells_of(rng, prototypes, ids):
    """One cell of each of the classes ``ids`` (int64[B, n]) and as many of background, in any order, as a map."""
    shown = torch.cat([prototypes[ids], torch.full((*ids.shape, prototypes.shape[1]), 0.1)], dim=1)
    noisy = nn.functional.normalize(shown + 0.04 * torch.randn(shown.shape, generator=rng), dim=2)
    order = torch.rand(shown.shape[:2], generator=rng).argsort(dim=1)
    places = order.argsort(dim=1)[:, : ids.shape[1]]
    noisy = noisy.gather(1, order[:, :, None].expand_as(noisy)).relu()
    return noisy.transpose(1, 2).unflatten(2, (2, -1)), places


def test_attention_by_cosines_learns_to_compare_in_a_few_steps(rng):
    """Three supports have one class in common with the query, three others each have not; new classes are told too."""
    torch.manual_seed(0)
    channels, base, new = 64, range(60), range(60, 90)
    prototypes = nn.functional.normalize(torch.randn(90, channels, generator=rng).relu(), dim=1)
    module = SimilarityFusion(
        channels,
        dropout=0.0,
        is_global=False,
        reweighting=None,
        normalize_weights=False,
        temperature=0.06,
    )
    head = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, 1, 1))
    is_shot = torch.ones(16, 3, dtype=torch.bool)

    def scores(classes):
        """Of the common class (Tensor[16, 1]) and of the others in the query (Tensor[16, 3])."""
        ids = torch.stack([torch.randperm(len(classes), generator=rng)[:13] for _ in range(16)])
        ids = ids + classes[0]
        query, places = cells_of(rng, prototypes, ids[:, :4])
        others = ids[:, 4:].unflatten(1, (3, 3))
        shown = torch.cat([ids[:, None, :1].expand(-1, 3, -1), others], dim=2)
        maps = cells_of(rng, prototypes, shown.flatten(0, 1))[0].unflatten(0, (16, 3))
        fused = module(module.describe(query), module.encode(maps, is_shot), is_shot)
        return head(fused).flatten(1).gather(1, places).split([1, 3], dim=1)

    optimizer = torch.optim.AdamW([*module.parameters(), *head.parameters()], lr=0.003)
    for _ in range(250):
        common, other = scores(base)
        loss = nn.functional.softplus(other - common).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for classes in (base, new):
            found = [common > other for common, other in (scores(classes) for _ in range(20))]
            assert torch.cat(found).float().mean() > 0.85
