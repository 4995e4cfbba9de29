"""Fine-tuning on an episode: what moves, what it does to the losses, and that nothing of it stays."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from factories import random_support_set, tiny_model, tiny_repmet
from torch.testing import assert_close

from fewshot_d2 import Support, SupportSet
from fewshot_d2.engine.finetune import FineTuning, fine_tuned

BASELINE_DML = ("MODEL.REPMET.EMBEDDING_DIM", 0)
BASELINE_FT = ("MODEL.REPMET.CLASSIFIER", "linear", "MODEL.REPMET.EMBEDDING_DIM", 0)


def tuning(layers="last_layer", epochs=2, lr=0.01):
    return FineTuning(layers, epochs, lr, 0.9, 1e-4)


def support_set(rng):
    def shot(*box):
        image = torch.randint(0, 256, (3, 48, 64), generator=rng, dtype=torch.uint8)
        return Support(image, torch.tensor(box, dtype=torch.float32))

    return SupportSet(
        [4, 9],
        ["four", "nine"],
        [[shot(2, 2, 30, 30), shot(20, 5, 60, 40)], [shot(10, 10, 50, 44), shot(1, 1, 20, 40)]],
    )


def total_loss(model, support, features, layers="last_layer"):
    with EventStorage(), torch.no_grad():
        tuner = model.episode_tuner(support, layers)
        return sum(
            loss.item()
            for n in range(len(tuner))
            for loss in tuner.losses(n, features.tensors).values()
        )


EMBEDDING = "roi_heads.box_predictor.embedding"
HEAD = ("roi_heads.box_head", "roi_heads.box_predictor.bbox_pred", EMBEDDING)


@pytest.mark.parametrize(
    ("overrides", "layers", "moved"),
    [
        ((), "last_layer", (EMBEDDING,)),
        (BASELINE_DML, "last_layer", ("roi_heads.box_head.fc2",)),
        (
            (*BASELINE_DML, "MODEL.ROI_BOX_HEAD.NAME", "NormedFCHead"),
            "last_layer",
            tuple(f"roi_heads.box_head.fc2.{name}" for name in ("weight", "bias", "norm")),
        ),
        (BASELINE_FT, "last_layer", ("roi_heads.box_predictor.cls_score",)),
        ((), "head", HEAD),
        ((), "all", (*HEAD, "proposal_generator", "backbone")),
    ],
)
def test_moves_what_it_says_and_restores_it_bit_by_bit(rng, overrides, layers, moved):
    model, support = tiny_repmet(*overrides), support_set(rng)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    # The rate is low: norms without statistics make a random backbone's maps large.
    with fine_tuned(model, support, tuning(layers, lr=1e-5)) as features:
        changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
        plain = model.encode_support([support])
    assert changed
    for part in moved:
        assert any(name.startswith(part) for name in changed), part
    assert all(name.startswith(moved) for name in changed)
    assert any(not torch.equal(t, plain.tensors[n]) for n, t in features.tensors.items())
    after = model.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert all(p.grad is None for p in model.parameters()) and not model.training


@pytest.mark.parametrize("overrides", [(), BASELINE_DML, BASELINE_FT], ids=["repmet", "dml", "ft"])
def test_lowers_the_losses_of_the_supports(rng, overrides):
    model, support = tiny_repmet(*overrides), support_set(rng)
    with torch.no_grad():
        before = total_loss(model, support, model.encode_support([support]))
    with fine_tuned(model, support, tuning(epochs=10, lr=0.02)) as features:
        assert total_loss(model, support, features) < 0.9 * before


def test_an_error_inside_restores_as_well(rng):
    model = tiny_repmet()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        fine_tuned(model, support_set(rng), tuning()),
    ):
        raise RuntimeError("in the middle")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_what_is_computed_once_equals_what_is_computed_every_time(rng):
    model, support = tiny_repmet(), support_set(rng)
    with torch.no_grad():
        features = model.encode_support([support]).tensors
    with EventStorage(), torch.no_grad():
        once, again = (model.episode_tuner(support, layers) for layers in ("last_layer", "head"))
        for number in range(len(once)):
            expected = again.losses(number, features)
            for name, loss in once.losses(number, features).items():
                assert_close(loss, expected[name])
        everything = model.episode_tuner(support, "all").losses(0, features)
    assert {"loss_rpn_cls", "loss_rpn_loc", "loss_cls"} <= set(everything)
    assert not model.proposal_generator.training
    # As many proposals are kept in training as in inference here, so the ROIs are the same.
    assert_close(everything["loss_cls"], once.losses(0, features)["loss_cls"])


def test_no_epoch_changes_nothing(rng):
    model, support = tiny_repmet(), support_set(rng)
    with torch.no_grad():
        plain = model.encode_support([support]).tensors
    with fine_tuned(model, support, tuning(epochs=0)) as features:
        assert all(torch.equal(t, plain[name]) for name, t in features.tensors.items())


def test_is_the_same_each_time(rng):
    model, support = tiny_repmet(), support_set(rng)
    results = []
    for state in range(2):
        # What was drawn before does not matter.
        torch.manual_seed(state)
        with fine_tuned(model, support, tuning()) as features:
            results.append(features.tensors["representatives"])
    assert torch.equal(*results)


def test_roi_labels_are_the_classes_of_the_episode(rng):
    model, support = tiny_repmet(), support_set(rng)
    with EventStorage():
        tuner = model.episode_tuner(support, "last_layer")
    for number, picture in enumerate(tuner.pictures):
        rows = tuner._rois[number].proposals.gt_rows
        assert set(rows.tolist()) <= {-1, *picture.rows.tolist()}
        # The ground truth is among the ROIs.
        assert set(picture.rows.tolist()) <= set(rows.tolist())


@pytest.mark.parametrize("prepare", [lambda: tiny_model(), lambda: tiny_repmet().train()])
def test_detectors_that_cannot_be_tuned_are_refused(rng, prepare):
    words = "fine-tuning needs a detector in inference mode"
    with (
        pytest.raises(ValueError, match=words),
        fine_tuned(prepare(), random_support_set(rng), tuning()),
    ):
        pass


def test_divergence_is_an_error_and_restores(rng):
    model = tiny_repmet()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with (
        pytest.raises(FloatingPointError, match=r"classes \[4, 9\] has diverged: .*BASE_LR"),
        fine_tuned(model, support_set(rng), tuning(epochs=20, lr=1e8)),
    ):
        pass
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"lr": 0.0}])
def test_tuning_that_does_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="EPOCHS must be at least 0 and BASE_LR above 0"):
        tuning(**wrong)


def test_unknown_layers_are_refused(rng):
    with (
        pytest.raises(ValueError, match="FINETUNE.LAYERS must be one of"),
        fine_tuned(tiny_repmet(), random_support_set(rng), tuning("backbone")),
    ):
        pass
