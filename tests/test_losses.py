"""Loss normalisers against loops over anchors and ROIs."""

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from factories import tiny_model

from fewshot_d2.modeling.losses import check_reduction, hard_negatives, rpn_normalizers

IMAGE = (64, 64)


def smooth_l1(x, beta=1.0):
    x = abs(x)
    return 0.5 * x * x / beta if x < beta else x - 0.5 * beta


@pytest.fixture(params=["detectron2", "original"])
def reduction(request):
    return request.param


def test_rpn_losses_equal_loops(reduction, rng):
    rpn = tiny_model("MODEL.MATCH.LOSS_REDUCTION", reduction).proposal_generator.train()
    anchors = Boxes(torch.tensor([[0.0, 0, 10, 10], [5, 5, 30, 20], [8, 8, 24, 24], [1, 2, 9, 20]]))
    truth = torch.tensor([[1.0, 1, 12, 9], [0, 0, 1, 1], [10, 6, 28, 20], [0, 0, 1, 1]])
    labels = [torch.tensor([1, 0, 1, -1]), torch.tensor([0, -1, 1, 0])]
    logits = torch.randn(2, 4, generator=rng)
    deltas = torch.randn(2, 4, 4, generator=rng)
    with EventStorage(0):
        losses = rpn.losses([anchors], [logits], labels, [deltas], [truth, truth])
    class_sum = box_sum = sampled = positives = 0.0
    transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    for n in range(2):
        for a in range(4):
            if labels[n][a] < 0:
                continue
            sampled += 1
            p = 1 / (1 + math.exp(-logits[n, a].item()))
            class_sum -= math.log(p if labels[n][a] == 1 else 1 - p)
            if labels[n][a] == 1:
                positives += 1
                target = transform.get_deltas(anchors.tensor[a : a + 1], truth[a : a + 1])[0]
                box_sum += sum(smooth_l1(x) for x in (deltas[n, a] - target).tolist())
    if reduction == "original":
        expected = class_sum / sampled, box_sum / (4 * positives)
    else:
        expected = class_sum / (2 * 256), box_sum / (2 * 256)
    assert losses["loss_rpn_cls"].item() == pytest.approx(expected[0], rel=1e-5)
    assert losses["loss_rpn_loc"].item() == pytest.approx(expected[1], rel=1e-5)


def test_roi_losses_equal_loops(reduction, rng):
    predictor = tiny_model("MODEL.MATCH.LOSS_REDUCTION", reduction).roi_heads.box_predictor.train()
    proposals = Instances(IMAGE)
    proposals.proposal_boxes = Boxes(torch.tensor([[0.0, 0, 10, 10], [5, 5, 30, 20], [1, 1, 9, 9]]))
    proposals.gt_boxes = Boxes(torch.tensor([[1.0, 1, 12, 9], [4, 6, 33, 22], [0, 0, 1, 1]]))
    proposals.gt_classes = torch.tensor([0, 0, 1])
    scores = torch.randn(3, 2, generator=rng)
    deltas = torch.randn(3, 4, generator=rng)
    with EventStorage(0):
        losses = predictor.losses((scores, deltas), [proposals])
    class_sum = box_sum = 0.0
    transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    for r in range(3):
        exponents = [math.exp(s) for s in scores[r].tolist()]
        class_sum -= math.log(exponents[proposals.gt_classes[r]] / sum(exponents))
        if proposals.gt_classes[r] == 0:
            target = transform.get_deltas(
                proposals.proposal_boxes.tensor[r : r + 1], proposals.gt_boxes.tensor[r : r + 1]
            )[0]
            box_sum += sum(smooth_l1(x) for x in (deltas[r] - target).tolist())
    slots = predictor.rois_per_image
    expected = (
        (class_sum / slots, box_sum / 8)
        if reduction == "original"
        else (class_sum / 3, box_sum / 3)
    )
    assert losses["loss_cls"].item() == pytest.approx(expected[0], rel=1e-5)
    assert losses["loss_box_reg"].item() == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize(
    ("num_positive", "negatives"), [(0, 0), (1, 2), (3, 6), (10, 20), (66, 134), (90, 134)]
)
def test_original_count_of_negatives(num_positive, negatives):
    """Spec 2.6: int(positives / 0.33) - positives negatives, none without a positive."""
    heads = tiny_model(
        *("MODEL.MATCH.NEGATIVES", "proportional", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 200),
        *("MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.33),
    ).roi_heads
    matched = torch.zeros(500, dtype=torch.long)
    labels = torch.zeros(500, dtype=torch.int8)
    labels[:num_positive] = 1
    sampled, classes = heads._sample_proposals(matched, labels, torch.tensor([0]))
    assert (classes == 0).sum() == min(num_positive, 66)
    assert (classes == 1).sum() == negatives
    assert len(sampled.unique()) == len(sampled)
    assert torch.equal(labels[sampled] == 1, classes == 0)


def test_no_samples_divide_by_one_and_unknown_names_fail():
    empty = {"num_slots": 0, "num_sampled": 0, "num_positive": 0}
    assert rpn_normalizers("original", **empty) == (1.0, 1.0)
    with pytest.raises(ValueError, match="'mean'"):
        check_reduction("mean")


def test_joint_proposals_compete_over_levels(rng):
    """Two equal boxes on two levels: level-wise NMS keeps both, joint NMS one."""
    kept = {}
    for joint in (False, True):
        rpn = tiny_model("MODEL.MATCH.JOINT_PROPOSALS", joint).proposal_generator
        anchors = [Boxes(torch.tensor([[5.0, 5, 25, 25]]))] * 2
        logits, deltas = [torch.tensor([[2.0]])] * 2, [torch.zeros(1, 1, 4)] * 2
        kept[joint] = len(rpn.predict_proposals(anchors, logits, deltas, [IMAGE])[0])
    assert kept == {False: 2, True: 1}


def test_hard_negatives_equal_a_loop(rng):
    losses = torch.rand(5, 12, generator=rng)
    positive = torch.zeros(5, 12, dtype=torch.bool)
    # None, one, three, so many that no more negatives are left, and all.
    for row, number in enumerate((0, 1, 3, 5, 12)):
        positive[row, torch.randperm(12, generator=rng)[:number]] = True
    chosen = hard_negatives(losses, positive, 3)
    for row in range(5):
        negatives = [a for a in range(12) if not positive[row, a]]
        negatives.sort(key=lambda a: -losses[row, a].item())
        expected = negatives[: 3 * int(positive[row].sum())]
        assert chosen[row].nonzero()[:, 0].tolist() == sorted(expected)
