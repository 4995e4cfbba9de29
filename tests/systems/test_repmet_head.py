"""RepMet's predictor: losses against loops, worked numbers of the spec, stock pipelines by keys alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from factories import random_query, random_support_set
from torch.testing import assert_close

from fewshot_d2 import add_fewshot_config
from fewshot_d2.modeling.losses import hardest_rois
from fewshot_d2.systems.repmet import LinearOutputLayers, NormedFCHead, RepMetOutputLayers

NUM_CLASSES, CHANNELS, DIM, MODES = 3, 10, 4, 2


def predictor(**changes):
    torch.manual_seed(0)
    values = {
        "box2box_transform": Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
        "num_classes": NUM_CLASSES,
        "cls_agnostic_bbox_reg": True,
        "smooth_l1_beta": 1.0,
        "test_topk_per_image": -1,
        "hard_rois": 4,
        "soft_nms_sigma": 0.0,
        "embedding_dim": DIM,
        "num_modes": MODES,
        "sigma": 0.5,
        "score_scale": 15.0,
        "class_loss": "softmax",
        "score": "softmax",
        "margin": 0.5,
        "margin_on": "squared_distance",
        "margin_weight": 1.0,
        "auxiliary_weight": 1.0,
        "support_modes": 5,
        "keep_base": False,
        **changes,
    }
    layers = RepMetOutputLayers(ShapeSpec(channels=CHANNELS), **values)
    for parameter in (layers.embedding.weight, layers.bbox_pred.weight):
        torch.nn.init.normal_(parameter)
    return layers


def labelled(labels, generator, *, with_truth=True):
    proposals = Instances((50, 50))
    corners = torch.rand(len(labels), 2, generator=generator) * 20
    proposals.proposal_boxes = Boxes(torch.cat([corners, corners + 15], dim=1))
    if with_truth:
        proposals.gt_boxes = Boxes(torch.cat([corners + 2, corners + 14], dim=1))
    proposals.gt_classes = torch.tensor(labels)
    return proposals


def smooth_l1(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def losses_by_loops(layers, x, proposals, keep):
    """Spec 1.3-1.5 one ROI after another."""
    embeddings = F.normalize(layers.embedding(x), dim=1)
    modes = F.normalize(layers.representatives, dim=2)
    auxiliary, deltas = layers.cls_score(x), layers.bbox_pred(x)
    totals = {"cls": 0.0, "box_reg": 0.0, "margin": 0.0, "auxiliary": 0.0}
    start = 0
    for image in proposals:
        rows = []
        for i in range(len(image)):
            label, e = image.gt_classes[i].item(), embeddings[start + i]
            d = [min(((e - m) ** 2).sum().item() for m in modes[c]) for c in range(NUM_CLASSES)]
            q = [math.exp(-v / (2 * 0.5**2)) + 1e-7 for v in d]
            q.append(1 + 1e-7 - max(q))
            exps = [math.exp(15 * v) for v in q]
            ce = -math.log(exps[label] / sum(exps))
            box = margin = 0.0
            if label < NUM_CLASSES:
                wanted = layers.box2box_transform.get_deltas(
                    image.proposal_boxes.tensor[i : i + 1], image.gt_boxes.tensor[i : i + 1]
                )[0]
                box = sum(
                    smooth_l1((a - b).item())
                    for a, b in zip(deltas[start + i], wanted, strict=True)
                )
                wrong = min(v for c, v in enumerate(d) if c != label)
                margin = max(d[label] - wrong + 0.5, 0.0)
            linear = F.cross_entropy(auxiliary[start + i], image.gt_classes[i]).item()
            rows.append((ce, box, margin, linear))
        kept = sorted(rows, key=lambda r: -(r[0] + r[1]))[:keep]
        totals["cls"] += sum(r[0] for r in kept) / len(kept)
        totals["auxiliary"] += sum(r[3] for r in kept) / len(kept)
        totals["box_reg"] += sum(r[1] for r in kept) / keep
        totals["margin"] += sum(r[2] for r in kept) / keep
        start += len(image)
    return {f"loss_{name}": total / len(proposals) for name, total in totals.items()}


@pytest.mark.parametrize("keep", [2, 4, 100])
def test_losses_equal_loops(rng, keep):
    layers = predictor(hard_rois=keep)
    proposals = [
        labelled([0, 1, 2, 3, 3, 3], rng),
        labelled([3, 3, 3], rng, with_truth=False),
        labelled([2, 3, 0], rng),
    ]
    x = torch.randn(12, CHANNELS, generator=rng)
    actual = layers.losses(layers(x), proposals)
    expected = losses_by_loops(layers, x, proposals, keep)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert_close(actual[name].item(), value, atol=1e-5, rtol=1e-4)


def test_loss_weights_multiply(rng):
    x, proposals = torch.randn(3, CHANNELS, generator=rng), [labelled([0, 2, 3], rng)]
    plain = predictor().losses(predictor()(x), proposals)
    weighted = predictor(
        margin_weight=0.0,
        auxiliary_weight=2.0,
        loss_weight={"loss_cls": 3.0, "loss_box_reg": 0.5},
    )
    for name, factor in (("cls", 3), ("margin", 0), ("auxiliary", 2), ("box_reg", 0.5)):
        name = f"loss_{name}"
        assert_close(weighted.losses(weighted(x), proposals)[name], factor * plain[name])


def test_worked_numbers_of_the_spec():
    layers = predictor(num_classes=2)
    layers.embedding = torch.nn.Identity()
    layers.representatives = torch.nn.Parameter(
        torch.tensor(
            [[[2.0, 0, 0, 0], [0, 3.0, 0, 0]], [[0, 0, 1.0, 0], [0, 0, 1.0, 2.0]]],
        )
    )
    x = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.3, 0.1, 0], [0, 0, 1, 1], [-1, 0, 0, 0.2]])
    x = F.pad(x, (0, CHANNELS - 4))
    layers.representatives = torch.nn.Parameter(F.pad(layers.representatives, (0, CHANNELS - 4)))
    scores, _ = layers(x)
    labels = torch.tensor([0, 0, 1, 2])
    assert_close(layers.class_losses(scores, labels).mean().item(), 5.7813e-5, atol=1e-8, rtol=1e-3)
    raw = predictor(score="posterior", num_classes=2).probabilities(scores)
    expected = [
        [1.0, 0.018316, 0],
        [0.797579, 0.027857, 0.202421],
        [0.018316, 0.814430, 0.185570],
        [0.018316, 0.036944, 0.963056],
    ]
    assert_close(raw, torch.tensor(expected), atol=2e-6, rtol=0)
    literal = predictor(class_loss="literal", num_classes=2).class_losses(scores, labels)
    assert_close(
        literal[1:].exp().reciprocal(),
        torch.tensor([0.797579, 0.81443, 0.963056]),
        atol=2e-6,
        rtol=0,
    )


def test_margin_on_distances(rng):
    x, proposals = torch.randn(1, CHANNELS, generator=rng), [labelled([1], rng)]
    layers = predictor(margin_on="distance", hard_rois=1)
    distances = layers(x)[0].distances.sqrt().amin(dim=2)[0]
    wrong = torch.minimum(distances[0], distances[2])
    expected = F.relu(distances[1] - wrong + 0.5)
    assert_close(layers.losses(layers(x), proposals)["loss_margin"], expected)


@pytest.mark.parametrize("keep", [1, 3, 10])
def test_hardest_rois_equal_sorting(rng, keep):
    losses, counts = torch.rand(12, generator=rng), [5, 0, 4, 3]
    kept = hardest_rois(losses, counts, keep)
    start = 0
    for count in counts:
        part = losses[start : start + count]
        expected = set(part.argsort(descending=True)[:keep].tolist())
        assert set(kept[start : start + count].nonzero()[:, 0].tolist()) == expected
        start += count


def test_episode_replaces_classes_and_ignores_empty_modes(rng):
    layers = predictor()
    x = torch.randn(6, CHANNELS, generator=rng)
    modes = torch.randn(2, 3, DIM, generator=rng)
    filled = torch.tensor([[True, False, False], [True, True, True]])
    probabilities = layers.probabilities(layers(x, {"representatives": modes, "filled": filled})[0])
    assert probabilities.shape == (6, 3)
    # An empty mode is infinitely far, whatever stands in it.
    modes[0, 1:] = layers.embedding(x[:1])
    again = layers.probabilities(layers(x, {"representatives": modes, "filled": filled})[0])
    assert torch.equal(probabilities, again)
    everywhere = torch.ones_like(filled)
    found = layers.probabilities(layers(x, {"representatives": modes, "filled": everywhere})[0])
    assert found[0, 0] > 0.9 > probabilities[0, 0]


def test_class_without_any_mode_is_never_found(rng):
    layers = predictor(score="posterior")
    x = torch.randn(5, CHANNELS, generator=rng)
    episode = layers.episode_tensors([x[:2], x[:0]], [2, 1])
    assert episode["filled"].tolist() == [[True, True], [False, False]]
    probabilities = layers.probabilities(layers(x, episode)[0])
    assert (probabilities[:, 1] <= 1e-6).all() and probabilities[0, 0] > 0.99


def test_base_classes_compete_but_are_not_reported(rng):
    x = torch.randn(6, CHANNELS, generator=rng)
    layers, rivals = predictor(), predictor(keep_base=True)
    episode = layers.episode_tensors([x[:1], x[1:2]], [1, 1])
    among = rivals.probabilities(rivals(x, episode)[0])
    distances = [layers(x, e)[0].distances.amin(dim=2) for e in (episode, layers.trained_tensors())]
    classes = torch.exp(-2 * torch.cat(distances, dim=1)) + 1e-7
    background = 1 + 1e-7 - classes.amax(dim=1, keepdim=True)
    joint = torch.softmax(15 * torch.cat([classes, background], dim=1), dim=1)
    assert_close(among, joint[:, [0, 1, 5]])
    assert rivals.background_label(rivals(x, episode)[0]) == 5


def test_each_roi_is_a_mode_until_there_are_too_many(rng):
    layers = predictor(support_modes=3)
    x = torch.randn(8, CHANNELS, generator=rng)
    tensors = layers.episode_tensors([x[:2], x[2:]], [1, 1])
    assert tensors["filled"].sum(dim=1).tolist() == [2, 3]
    unit = F.normalize(layers.embedding(x), dim=1)
    assert_close(tensors["representatives"][0, :2], unit[:2])
    # Lloyd's fixed point: each centre is the mean of the points nearest to it.
    centres = tensors["representatives"][1]
    nearest = torch.cdist(unit[2:], centres).argmin(dim=1)
    for k in range(3):
        assert_close(centres[k], unit[2:][nearest == k].mean(dim=0), atol=1e-5, rtol=1e-4)


def test_representatives_lie_around_their_class_in_the_same_way():
    layers = predictor(num_classes=40, num_modes=5, embedding_dim=64)
    offsets = layers.representatives - layers.representatives.mean(dim=1, keepdim=True)
    assert_close(offsets[0], offsets[7], atol=1e-6, rtol=1e-4)
    places = layers.representatives.mean(dim=1)
    assert_close(places.std().item(), 0.1, atol=0.01, rtol=0.1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("class_loss", "sigmoid"), ("score", "p"), ("margin_on", "cosine"), ("hard_rois", 0)],
)
def test_unknown_values_are_refused(key, value):
    with pytest.raises(ValueError, match=key.upper()):
        predictor(**{key: value})


def test_linear_rows_take_the_place_of_trained_ones(rng):
    layers = LinearOutputLayers(
        ShapeSpec(channels=CHANNELS),
        box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
        num_classes=NUM_CLASSES,
        cls_agnostic_bbox_reg=True,
        hard_rois=4,
        soft_nms_sigma=0.0,
    )
    x = torch.randn(5, CHANNELS, generator=rng)
    trained, _ = layers(x)
    again, _ = layers(x, {"rows": layers.trained_tensors()["rows"][[2, 0]]})
    assert_close(again, trained[:, [2, 0, NUM_CLASSES]])
    rows = layers.episode_tensors([x[:1], x[:1]], [1, 1])["rows"]
    assert rows.shape == (2, CHANNELS + 1) and (rows[:, -1] == 0).all()


def test_soft_nms_lowers_scores_of_overlapping_boxes():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 14], [30, 30, 40, 40]])
    proposals = Instances((50, 50))
    proposals.proposal_boxes = Boxes(boxes)
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])

    def detect(sigma):
        layers = predictor(soft_nms_sigma=sigma, test_nms_thresh=0.9, num_classes=1)
        layers.predict_probs = lambda predictions, proposals: (scores,)
        return layers.inference((None, torch.zeros(3, 4)), [proposals])

    (hard,), _ = detect(0.0)
    assert_close(hard.scores, torch.tensor([0.9, 0.8, 0.7]))
    (soft,), (rois,) = detect(0.6)
    overlap = 100 / 140
    expected = [0.9, 0.7, 0.8 * math.exp(-(overlap**2) / 0.6)]
    assert_close(soft.scores, torch.tensor(expected))
    assert rois.tolist() == [0, 2, 1]


STOCK = {
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml": "RepMetROIHeads",
    "COCO-Detection/faster_rcnn_R_50_C4_3x.yaml": "RepMetRes5ROIHeads",
}


@pytest.mark.parametrize("meta_architecture", ["GeneralizedRCNN", "RepMet"])
@pytest.mark.parametrize(("file", "heads"), STOCK.items())
def test_stock_configs_become_repmet_by_keys(file, heads, meta_architecture, rng):
    cfg = get_cfg()
    add_fewshot_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(file))
    cfg.merge_from_list(
        [
            *("MODEL.META_ARCHITECTURE", meta_architecture, "MODEL.ROI_HEADS.NAME", heads),
            *("MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
            *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 10, "MODEL.RPN.POST_NMS_TOPK_TEST", 10),
            *("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 64),
        ]
    )
    torch.manual_seed(0)
    model = build_model(cfg).train()
    support = random_support_set(rng, ways=2)
    query = random_query(rng, support)
    if heads == "RepMetRes5ROIHeads":
        query["instances"].remove("gt_masks")
    with EventStorage():
        losses = model([query])
    sum(losses.values()).backward()
    assert {"loss_cls", "loss_margin", "loss_auxiliary", "loss_box_reg"} <= set(losses)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert model.roi_heads.box_predictor.representatives.grad.abs().sum() > 0
    with torch.no_grad():
        instances = model.eval()([query])[0]["instances"]
    assert set(instances.pred_classes.tolist()) <= {0, 1}
    assert instances.has("pred_masks") == cfg.MODEL.MASK_ON


def test_head_with_batch_norm_keeps_the_names_of_a_plain_one(rng):
    plain_names = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    head = NormedFCHead(ShapeSpec(channels=2, height=3, width=3), conv_dims=[], fc_dims=[8, 5])
    assert plain_names <= set(head.state_dict())
    x = torch.randn(30, 2, 3, 3, generator=rng)
    y = head.train()(x)
    assert y.shape == (30, 5) and y.min() == 0
    before = head.fc1(x.flatten(1))
    assert_close(before.mean(dim=0), torch.zeros(8), atol=1e-5, rtol=0)
