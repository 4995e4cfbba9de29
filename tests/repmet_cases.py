"""A small predictor of RepMet and labelled ROIs, shared by the tests of its losses and of its classes."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances

from fewshot_d2.systems.repmet import RepMetOutputLayers

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
