"""What SILCO promises as a detector: supports without boxes, encoded once, in any number and order."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, pairwise_iou
from factories import ROOT, random_query, random_support, random_support_set
from PIL import Image
from silco_cases import SIDE, awake, coloured_tuples, small_silco
from torch.testing import assert_close

from fewshot_d2 import FewShotPredictor, Support, SupportFeatures, SupportSet, load_config
from fewshot_d2.evaluation.pooled_ap import PooledPrecision
from fewshot_d2.systems.silco.priors import assigned

OMNIGLOT = ROOT / "configs/silco/omniglot_ssm_frm.yaml"
SMALL = [
    *("MODEL.DEVICE", "cpu", "INPUT.MAX_SIZE_TRAIN", 64, "INPUT.MAX_SIZE_TEST", 64),
    *("FEWSHOT.PRETRAIN.MAX_ITER", 0, "MODEL.RESNETS.NORM", "BN"),
]


@pytest.fixture(scope="module")
def model():
    return awake(small_silco()).eval()


def queries_with(rng, *support_sets):
    return [random_query(rng, support, side=SIDE) for support in support_sets]


def same(first: Instances, second: Instances) -> None:
    assert len(first) == len(second) > 0
    assert_close(first.scores, second.scores, atol=1e-5, rtol=1e-4)
    assert_close(first.pred_boxes.tensor, second.pred_boxes.tensor, atol=1e-3, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_many_classes_equal_one_at_a_time(model, rng, monkeypatch, chunk):
    monkeypatch.setattr(model, "pairs_per_chunk", chunk)
    support = random_support_set(rng, ways=3, shots=2)
    (query,) = queries_with(rng, support)
    together = model([query])[0]["instances"]
    for k in range(3):
        part = SupportSet([1], ["a"], [support.examples[k]])
        alone = model([{**query, "support": part}])[0]["instances"]
        same(together[together.pred_classes == k], alone)


@torch.no_grad()
def test_classes_with_different_shots_do_not_mix(model, rng):
    shots = [[random_support(rng) for _ in range(number)] for number in (1, 4, 2)]
    support = SupportSet([1, 2, 3], ["a", "b", "c"], shots)
    joined = model.encode_support([support])
    (query,) = queries_with(rng, support)
    together = model([query])[0]["instances"]
    assert joined.tensors["is_shot"].sum(dim=1).tolist() == [1, 4, 2]
    for k, of_class in enumerate(shots):
        part = SupportSet([1], ["a"], [of_class])
        alone = model.encode_support([part])
        weights = joined.tensors["scale0.weights"][k]
        assert_close(weights[: len(of_class)], alone.tensors["scale0.weights"][0])
        assert not weights[len(of_class) :].any()
        found = model([{**query, "support": part}])[0]["instances"]
        same(together[together.pred_classes == k], found)


@torch.no_grad()
def test_queries_of_a_batch_do_not_mix(model, rng):
    supports = [random_support_set(rng, ways=1, shots=3), random_support_set(rng, ways=2)]
    queries = queries_with(rng, *supports)
    for query, output in zip(queries, model(queries), strict=True):
        same(output["instances"], model([query])[0]["instances"])


@torch.no_grad()
def test_permuted_supports_have_permuted_weights_and_the_same_result(model, rng):
    shots = [random_support(rng) for _ in range(4)]
    order = [2, 0, 3, 1]
    first, second = (
        SupportSet([1], ["a"], [s]) for s in (shots, [shots[position] for position in order])
    )
    weights, permuted = (
        model.encode_support([s]).tensors["scale0.weights"] for s in (first, second)
    )
    assert_close(weights[:, order], permuted)
    assert weights.std() > 1e-4, "weights that are all alike would show nothing"
    (query,) = queries_with(rng, first)
    same(model([query])[0]["instances"], model([{**query, "support": second}])[0]["instances"])


@torch.no_grad()
def test_encoded_and_described_once_equals_forward(model, rng, tmp_path):
    support = random_support_set(rng, ways=2, shots=3)
    (query,) = queries_with(rng, support)
    expected = model([query])[0]["instances"]
    model.encode_support([support]).save(tmp_path / "features.pt")
    features = SupportFeatures.load(tmp_path / "features.pt")
    del query["support"]
    given = model([{**query, "support_features": features}])[0]["instances"]
    searched = model.search(model.describe_queries([query])[0], features)
    for result in (given, searched):
        assert torch.equal(result.scores, expected.scores)
        assert torch.equal(result.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(result.pred_classes, expected.pred_classes)


def naive_fused(model, name, query, support):
    """The enhanced map of each class, a 1x1 convolution and a ReLU after its fusion (spec A5)."""
    fusion, mix, rows = model.fusions[name], model.mixes[name], []
    described = fusion.describe(model.backbone(model.preprocess([query]).tensor)[name])
    for shots in support.examples:
        tensors = model.encode_support([SupportSet([1], ["a"], [shots])]).tensors
        of_map = {k.removeprefix(f"{name}."): t for k, t in tensors.items()}
        enhanced = fusion(described, of_map, tensors["is_shot"])
        mixed = torch.einsum("oc,pchw->pohw", mix.weight.flatten(1), enhanced)
        rows.append(mixed + mix.bias[:, None, None])
    assert (torch.cat(rows) < 0).any(), "without negative values a ReLU would show nothing"
    return torch.cat(rows).clamp(min=0)


def naive_attention(fusion, query, keys, cell):
    """How much a cell looks at each token of the supports (keys: Tensor[S, h * w, D]), Tensor[S, h * w]."""
    theta = fusion.describe(query)["theta"][0, cell]
    places = [[float(theta @ key) for key in of_support] for of_support in keys]
    exps = torch.tensor(places).double().mul(fusion.attention_scale).exp()
    return exps / (exps.sum() if fusion.is_global else exps.sum(dim=1, keepdim=True))


@torch.no_grad()
@pytest.mark.parametrize("similarity", ["gap", "image", "global"])
def test_explanation_is_of_the_search(rng, similarity):
    """Of the first class, without its missing supports, in the first map that is used."""
    keys = ("MODEL.SILCO.SIMILARITY", similarity, "MODEL.SILCO.REWEIGHTING", similarity == "image")
    model = built(*keys).eval()
    model = model if similarity == "gap" else awake(model)
    shots = [[random_support(rng) for _ in range(number)] for number in (2, 3)]
    support = SupportSet([1, 2], ["a", "b"], shots)
    query = random_query(rng, support)
    (described,) = model.describe_queries([query])
    features = model.encode_support([support])
    shown = model.explain(described, features)
    before = model.backbone(model.preprocess([query]).tensor)["scale1"]
    fused = naive_fused(model, "scale1", query, support)[:1]
    assert_close(shown["query map"], before[0].mean(dim=0), atol=1e-4, rtol=1e-4)
    assert_close(shown["enhanced map"], fused[0].mean(dim=0), atol=1e-4, rtol=1e-4)
    logits = model.head.classification_head.module_list[0](fused)[0]
    of_prior = [logits[2 * k : 2 * k + 2].softmax(dim=0)[1] for k in range(len(logits) // 2)]
    assert_close(shown["score"], torch.stack(of_prior).amax(dim=0), atol=1e-5, rtol=1e-4)
    found = model.search(described, features[[0]])
    assert shown["score"].max() <= found.scores.max() + 1e-6
    if similarity == "gap":
        assert "attention" not in shown
    else:
        assert shown["attention"].shape == (8, 8, 2, 8, 8)
        keys = features.tensors["scale1.keys"][0, :2]
        for row, column in ((3, 5), (0, 7)):
            expected = naive_attention(
                model.fusions["scale1"], before, keys, 8 * row + column
            ).unflatten(1, (8, 8))
            actual = shown["attention"][row, column].double()
            assert_close(actual, expected, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_query_trunk_is_run_once_a_query(model, rng, monkeypatch):
    sizes = []
    original = model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda x: sizes.append(len(x)) or original(x))
    support = random_support_set(rng, ways=5, shots=1)
    model(queries_with(rng, support, support))
    assert sizes[0] == 2 and sum(sizes[1:]) == 5


@torch.no_grad()
def test_boxes_of_supports_are_not_looked_at(model, rng):
    image = random_support(rng).image
    plain, boxed = (
        model.encode_support([SupportSet([1], ["a"], [[Support(image, box)]])]).tensors
        for box in (None, torch.tensor([3.0, 4, 12, 20]))
    )
    assert all(torch.equal(plain[name], boxed[name]) for name in plain)


@torch.no_grad()
def test_results_are_scaled_by_two_factors(model, rng):
    (query,) = queries_with(rng, random_support_set(rng))
    small = model([query])[0]["instances"]
    large = model([{**query, "height": 3 * SIDE, "width": 5 * SIDE}])[0]["instances"]
    scale = torch.tensor([5.0, 3.0, 5.0, 3.0])
    assert_close(large.pred_boxes.tensor, small.pred_boxes.tensor * scale, atol=1e-3, rtol=1e-4)


def naive_losses(model, queries, *, iou, ratio):
    """Prior by prior, after spec A6."""
    _, pairs = model.gather_supports(queries)
    fused = [
        torch.cat([naive_fused(model, name, query, query["support"]) for query in queries])
        for name in model.fusions
    ]
    predicted = model.head(fused)
    priors = model.priors(fused, (SIDE, SIDE))
    class_sum = box_sum = positives = 0
    for p, target in enumerate(pairs.targets(queries, model.device)):
        logits, truth = predicted["cls_logits"][p], target.gt_boxes
        found = assigned(pairwise_iou(truth, Boxes(priors)), iou).tolist()
        losses = [
            F.cross_entropy(logits[a], torch.tensor(int(g >= 0))) for a, g in enumerate(found)
        ]
        own = [a for a, g in enumerate(found) if g >= 0]
        others = sorted(set(range(len(found))) - set(own), key=lambda a: -losses[a].item())
        positives += len(own)
        class_sum = class_sum + sum(losses[a] for a in [*own, *others[: ratio * len(own)]])
        for a in own:
            x0, y0, x1, y1 = priors[a].tolist()
            u0, v0, u1, v1 = truth.tensor[found[a]].tolist()
            wanted = [
                ((u0 + u1) / 2 - (x0 + x1) / 2) / (0.1 * (x1 - x0)),
                ((v0 + v1) / 2 - (y0 + y1) / 2) / (0.1 * (y1 - y0)),
                math.log((u1 - u0) / (x1 - x0)) / 0.2,
                math.log((v1 - v0) / (y1 - y0)) / 0.2,
            ]
            for value, aim in zip(predicted["bbox_regression"][p, a].tolist(), wanted, strict=True):
                off = abs(value - aim)
                box_sum += off * off / 2 if off < 1 else off - 0.5
    return class_sum / positives, box_sum / positives


@pytest.mark.parametrize(("iou", "ratio"), [(0.5, 3), (0.3, 1)])
def test_losses_equal_loops_and_count_positives_of_the_whole_batch(rng, iou, ratio):
    model = awake(small_silco()).train()
    model.match_iou, model.negative_ratio = iou, ratio
    queries = queries_with(rng, random_support_set(rng), random_support_set(rng, shots=3))
    losses = model(queries)
    class_loss, box_loss = naive_losses(model, queries, iou=iou, ratio=ratio)
    assert_close(losses["loss_class"], class_loss)
    assert losses["loss_box"].item() == pytest.approx(box_loss, rel=1e-4)


def test_batch_without_any_object_has_no_loss_and_finite_gradients(rng):
    model = awake(small_silco()).train()
    (query,) = queries_with(rng, random_support_set(rng))
    losses = model([{**query, "instances": query["instances"][[]]}])
    assert losses["loss_class"] == losses["loss_box"] == 0
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and not any(g.any() for g in gradients)


def test_learns_four_tuples_that_only_supports_tell_apart(rng):
    queries, model = coloured_tuples(rng), small_silco(scales=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(160):
        optimizer.zero_grad()
        sum(model(queries).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    precision = PooledPrecision("voc")
    with torch.no_grad():
        outputs = model.eval()(queries)
    for number, (query, output) in enumerate(zip(queries, outputs, strict=True)):
        found, truth = output["instances"], query["instances"]
        precision.add(
            number,
            0,
            image=number,
            boxes=found.pred_boxes.tensor.numpy(),
            scores=found.scores.numpy(),
            truth_boxes=truth.gt_boxes.tensor.numpy(),
            truth_classes=np.zeros(len(truth), dtype=int),
        )
    assert precision.summary()["joint"] > 0.9


def built(*overrides):
    torch.manual_seed(0)
    return build_model(load_config(str(OMNIGLOT), [*SMALL, *overrides]))


def test_separate_trunks_start_alike_and_learn_apart(rng):
    model = built("MODEL.SILCO.SEPARATE_TRUNKS", True, "MODEL.BACKBONE.FREEZE_AT", 0).train()
    theirs = dict(model.support_backbone.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in model.backbone.named_parameters())
    sum(awake(model)([random_query(rng, random_support_set(rng))]).values()).backward()
    assert any(p.grad is not None and p.grad.any() for p in theirs.values())
    assert not any(p is theirs[n] for n, p in model.backbone.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("similarity", ["gap", "image", "global"])
def test_number_of_shots_does_not_change_the_size_of_normalised_maps(rng, similarity):
    """Copies of one support say what it says alone."""
    keys = ("MODEL.SILCO.SIMILARITY", similarity, "MODEL.SILCO.NORMALIZE_WEIGHTS", True)
    model = built(*keys, "MODEL.SILCO.REWEIGHTING", similarity == "image").eval()
    if similarity != "gap":
        awake(model)
    shot = random_support(rng)
    query = random_query(rng, SupportSet([1], ["a"], [[shot]]))
    copies = {**query, "support": SupportSet([1], ["a"], [[shot] * 5])}
    same(model([query])[0]["instances"], model([copies])[0]["instances"])


@torch.no_grad()
def test_summed_weights_make_maps_larger_with_more_shots(model, rng):
    shot = random_support(rng)
    weights = [
        model.encode_support([SupportSet([1], ["a"], [[shot] * n])]).tensors["scale0.weights"]
        for n in (1, 2)
    ]
    assert 0 < weights[0].sum() < 1 and weights[1].sum() > weights[0].sum()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.SILCO.SIMILARITY", "mean", "SIMILARITY must be one of"),
        ("MODEL.SILCO.SIMILARITY", "global", "REWEIGHTING must be False unless"),
        ("MODEL.SILCO.SOURCES", (0, 6), "SOURCES must be .* of the trunk's maps 0 to 5, got"),
        ("MODEL.SILCO.SOURCES", (), "SOURCES must be .* of the trunk's maps"),
        ("MODEL.SILCO.SOURCES", (1, 1), "SOURCES must be different"),
        ("MODEL.SILCO.STEPS", (4, 8, 16), r"must be of 4 maps, got of \(3, 6, 6\)"),
        ("MODEL.SILCO.SIZES", (10, 20, 34, 48), r"must be of 4 maps, got of \(6, 3, 6\)"),
        ("FEWSHOT.RESIZE_RULE", "paper", "RESIZE_RULE must be 'stretch' for SILCO"),
        ("MODEL.SILCO.TEMPERATURE", -0.06, "TEMPERATURE must be 0 or at least"),
    ],
)
def test_contradicting_keys_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        built(key, value)


def test_pre_training_is_on_objects_in_the_maps_that_are_used():
    model = built("MODEL.SILCO.SOURCES", (0, 2))
    assert model.object_levels == ["scale0", "scale2"]
    with pytest.raises(ValueError, match=r"PRETRAIN.TASK must be 'objects'"):
        built("FEWSHOT.PRETRAIN.MAX_ITER", 1, "FEWSHOT.PRETRAIN.TASK", "pairs")


def test_one_trunk_alone_cannot_be_pre_trained():
    with pytest.raises(ValueError, match=r"PRETRAIN.MAX_ITER must be 0"):
        built("MODEL.SILCO.SEPARATE_TRUNKS", True, "FEWSHOT.PRETRAIN.MAX_ITER", 1)


def test_temperature_reaches_the_attention_of_every_map():
    for keys, scale in (((), 1 / 0.06), (("MODEL.SILCO.TEMPERATURE", 0.0), 64**-0.5)):
        fusions = list(built(*keys).fusions.values())
        assert fusions[0].attention_scale == pytest.approx(scale)
        alike = [torch.equal(f.theta.weight, f.phi.weight) for f in fusions]
        assert alike == [not keys] * 3


def test_cropped_supports_are_warned_of(caplog):
    built("FEWSHOT.SUPPORT.FORM", "crop")
    assert "whole pictures" in caplog.text


@torch.no_grad()
def test_pictures_of_any_kind(tmp_path):
    """Of one pixel, grey and with transparency, as supports and as queries."""
    rng = np.random.default_rng(0)
    pictures = {
        "pixel": rng.integers(0, 255, (1, 1, 3), dtype=np.uint8),
        "thin": rng.integers(0, 255, (1, 90, 3), dtype=np.uint8),
        "grey": rng.integers(0, 255, (40, 30), dtype=np.uint8),
        "rgba": rng.integers(0, 255, (30, 40, 4), dtype=np.uint8),
    }
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    files = [tmp_path / f"{name}.png" for name in pictures]
    predictor = FewShotPredictor(load_config(str(OMNIGLOT), SMALL))
    predictor.set_support(SupportSet([1], ["a"], [[Support.from_file(file) for file in files]]))
    for pixels, found in zip(pictures.values(), predictor.predict(files), strict=True):
        height, width = pixels.shape[:2]
        assert found.image_size == (height, width)
        assert torch.isfinite(found.scores).all() and torch.isfinite(found.pred_boxes.tensor).all()
        corners = found.pred_boxes.tensor
        assert (corners >= 0).all() and (corners <= torch.tensor([width, height] * 2)).all()


@torch.no_grad()
@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_query_that_equals_its_only_support(rng, image_format):
    """It has the support's maps, and before any training each of its cells looks most at itself."""
    model, side = built("INPUT.FORMAT", image_format).eval(), 64
    image = torch.randint(0, 256, (3, side, side), generator=rng, dtype=torch.uint8)
    features = model.encode_support([SupportSet([1], ["a"], [[Support(image)]])])
    # Supports are always RGB.
    image = image.flip(0) if image_format == "BGR" else image
    (described,) = model.describe_queries([{"image": image, "height": side, "width": side}])
    for name, fusion in model.fusions.items():
        # Projections are alike at first, so that keys are those of the query.
        theta = fusion.describe(described["maps"][name])["theta"]
        assert_close(features.tensors[f"{name}.keys"][0], theta, atol=1e-5, rtol=1e-4)
    attention = model.explain(described, features)["attention"]
    assert attention.flatten(2).argmax(dim=2).flatten().tolist() == list(range(64))
    found = model.search(described, features)
    assert len(found) and torch.isfinite(found.scores).all()


@torch.no_grad()
def test_supports_in_the_channel_order_of_queries(rng):
    shot = random_support(rng)
    rgb, bgr = (
        built("INPUT.FORMAT", image_format)
        .eval()
        .encode_support([SupportSet([1], ["a"], [[given]])])
        for image_format, given in (("RGB", shot), ("BGR", Support(shot.image.flip(0))))
    )
    assert all(torch.equal(tensor, bgr.tensors[name]) for name, tensor in rgb.tensors.items())


def test_no_class_and_no_support_are_refused(model, rng):
    (query,) = queries_with(rng, random_support_set(rng))
    with pytest.raises(ValueError, match="at least one class"):
        SupportSet([], [], [])
    with pytest.raises(ValueError, match="must have at least one positive support"):
        SupportSet([1], ["a"], [[]])
    with pytest.raises(ValueError, match="every query must have 'support'"):
        model([{**query, "support": None}])
