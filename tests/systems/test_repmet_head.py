"""RepMet's predictor: classes that are exchanged, stock pipelines by keys alone."""

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
from factories import ROOT, random_query, random_support_set
from repmet_cases import CHANNELS, DIM, NUM_CLASSES, predictor
from torch.testing import assert_close

from fewshot_d2 import add_fewshot_config, load_config
from fewshot_d2.systems.repmet import LinearOutputLayers, NormedFCHead


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


@pytest.mark.parametrize(("shots", "expected"), [(1, 2), (3, 6), (4, 7)])
def test_more_shots_allow_more_modes(rng, shots, expected):
    layers = predictor(support_modes=2)
    tensors = layers.episode_tensors([torch.randn(7, CHANNELS, generator=rng)], [shots])
    assert tensors["filled"].sum() == expected


def test_representatives_lie_around_their_class_in_the_same_way():
    layers = predictor(num_classes=40, num_modes=5, embedding_dim=64)
    offsets = layers.representatives - layers.representatives.mean(dim=1, keepdim=True)
    assert_close(offsets[0], offsets[7], atol=1e-6, rtol=1e-4)
    places = layers.representatives.mean(dim=1)
    assert_close(places.std().item(), 0.1, atol=0.01, rtol=0.1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("class_loss", "sigmoid"), ("score", "p"), ("margin_on", "cosine"), ("hard_rois", 0)),
        *(("sigma", 0.0), ("num_modes", 0), ("embedding_dim", -1)),
    ],
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

    def detect(sigma, **changes):
        layers = predictor(soft_nms_sigma=sigma, test_nms_thresh=0.9, num_classes=1, **changes)
        layers.predict_probs = lambda predictions, proposals: (scores,)
        return layers.inference((None, torch.zeros(3, 4)), [proposals])

    (hard,), _ = detect(0.0)
    assert_close(hard.scores, torch.tensor([0.9, 0.8, 0.7]))
    (soft,), (rois,) = detect(0.6)
    overlap = 100 / 140
    expected = [0.9, 0.7, 0.8 * math.exp(-(overlap**2) / 0.6)]
    assert_close(soft.scores, torch.tensor(expected))
    assert rois.tolist() == [0, 2, 1]
    # The limit holds for what is left, the threshold for what comes in.
    (two,), (rois,) = detect(0.6, test_topk_per_image=2)
    assert torch.equal(two.scores, soft.scores[:2]) and rois.tolist() == [0, 2]
    (sure,), (rois,) = detect(0.6, test_score_thresh=0.75)
    assert torch.equal(sure.scores, soft.scores[[0, 2]]) and rois.tolist() == [0, 1]


# Spec 7, by row.
PRESETS = {
    "RepMet": {
        **{"REPMET.CLASS_LOSS": "softmax", "REPMET.MARGIN_ON": "squared_distance"},
        **{
            "REPMET.MARGIN": 0.5,
            "REPMET.HARD_ROIS": 512,
            "ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        },
        **{"REPMET.LOSS_WEIGHTS": (1.0, 1.0, 1.0), "REPMET.KMEANS": "none"},
        **{"REPMET.SUPPORT_ROIS": "best_iou", "REPMET.SOFT_NMS_SIGMA": 0.0, "REPMET.SIGMA": 0.5},
        **{"ROI_HEADS.NMS_THRESH_TEST": 0.3, "RPN.POST_NMS_TOPK_TEST": 2000},
        **{"ROI_HEADS.SCORE_THRESH_TEST": 0.0, "REPMET.NUM_MODES": 5, "REPMET.EMBEDDING_DIM": 256},
    },
    "code": {"REPMET.KMEANS": "every_epoch"},
    "paper": {
        **{"REPMET.CLASS_LOSS": "literal", "REPMET.MARGIN_ON": "distance"},
        **{"ROI_BOX_HEAD.NAME": "NormedFCHead", "REPMET.LOSS_WEIGHTS": (1.0, 1.0, 0.0)},
        **{"REPMET.SUPPORT_ROIS": "all_iou", "REPMET.SOFT_NMS_SIGMA": 0.6},
        **{"REPMET.SCORE": "posterior"},
    },
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_those_of_the_spec(name):
    cfg = load_config(str(ROOT / f"configs/repmet/Base-{name}.yaml")).MODEL
    for key, value in {**PRESETS["RepMet"], **PRESETS[name]}.items():
        node, leaf = key.split(".")
        assert cfg[node][leaf] == value, key


STOCK = {
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml": "RepMetROIHeads",
    "COCO-Detection/faster_rcnn_R_50_C4_3x.yaml": "RepMetRes5ROIHeads",
}


def stock_model(file, heads, meta_architecture):
    cfg = get_cfg()
    add_fewshot_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(file))
    cfg.merge_from_list(
        [
            *("MODEL.META_ARCHITECTURE", meta_architecture, "MODEL.ROI_HEADS.NAME", heads),
            *("MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
            *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 10, "MODEL.RPN.POST_NMS_TOPK_TEST", 10),
            *("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 64),
            *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
        ]
    )
    torch.manual_seed(0)
    return build_model(cfg)


@torch.no_grad()
@pytest.mark.parametrize(("file", "heads"), STOCK.items())
def test_without_supports_it_is_the_stock_pipeline(file, heads, rng):
    query = random_query(rng, random_support_set(rng, ways=2))
    del query["support"]
    stock, own = (stock_model(file, heads, m).eval() for m in ("GeneralizedRCNN", "RepMet"))
    # Boxes stay where proposals are, and inside.
    torch.nn.init.zeros_(stock.roi_heads.box_predictor.bbox_pred.weight)
    torch.nn.init.normal_(stock.roi_heads.box_predictor.embedding.weight)
    own.load_state_dict(stock.state_dict())
    expected, found = (model([query])[0]["instances"] for model in (stock, own))
    assert len(expected)
    assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    for name in set(expected.get_fields()) - {"pred_boxes"}:
        assert_close(found.get(name), expected.get(name))


@pytest.mark.parametrize("meta_architecture", ["GeneralizedRCNN", "RepMet"])
@pytest.mark.parametrize(("file", "heads"), STOCK.items())
def test_stock_configs_become_repmet_by_keys(file, heads, meta_architecture, rng):
    model = stock_model(file, heads, meta_architecture).train()
    support = random_support_set(rng, ways=2)
    query = random_query(rng, support)
    if heads == "RepMetRes5ROIHeads":
        query["instances"].remove("gt_masks")
    del query["support"]
    with EventStorage():
        losses = model([query])
    sum(losses.values()).backward()
    assert {"loss_cls", "loss_margin", "loss_auxiliary", "loss_box_reg"} <= set(losses)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert model.roi_heads.box_predictor.representatives.grad.abs().sum() > 0
    with torch.no_grad():
        instances = model.eval()([query])[0]["instances"]
        assert set(instances.pred_classes.tolist()) <= {0, 1}
        if meta_architecture == "RepMet":
            instances = model([{**query, "support": support}])[0]["instances"]
    assert instances.has("pred_masks") == ("mask_rcnn" in file)


def test_head_with_batch_norm_keeps_the_names_of_a_plain_one(rng):
    plain_names = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    head = NormedFCHead(ShapeSpec(channels=2, height=3, width=3), conv_dims=[], fc_dims=[8, 5])
    assert plain_names <= set(head.state_dict())
    x = torch.randn(30, 2, 3, 3, generator=rng)
    y = head.train()(x)
    assert y.shape == (30, 5) and y.min() == 0
    before = head.fc1(x.flatten(1))
    assert_close(before.mean(dim=0), torch.zeros(8), atol=1e-5, rtol=0)
