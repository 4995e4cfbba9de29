"""K-means of representatives while training: when, from what, and that a resumed run does the same."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import pairwise_iou
from factories import TINY_REPMET, TINY_REPMET_OVERRIDES, registered_set, tiny_repmet, write_set

from fewshot_d2 import load_config
from fewshot_d2.engine import EpisodicTrainer

NAME = "refreshed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refresh")
    write_set(folder, num_images=10)
    with registered_set(NAME, folder):
        yield folder


def trainer_of(folder, output, *overrides):
    own = ["DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (), "MODEL.ROI_HEADS.NUM_CLASSES", 4]
    own += ["SOLVER.IMS_PER_BATCH", 4, "OUTPUT_DIR", str(output), "SOLVER.MAX_ITER", 5]
    # Pictures of queries without supports are drawn on the way.
    own += [
        "VIS_PERIOD",
        2,
        "MODEL.REPMET.KMEANS",
        "every_epoch",
        "MODEL.RPN.POST_NMS_TOPK_TEST",
        150,
    ]
    cfg = load_config(str(TINY_REPMET), [*TINY_REPMET_OVERRIDES, *own, *overrides])
    torch.manual_seed(0)
    return EpisodicTrainer(cfg)


def refreshing(trainer):
    (hook,) = [h for h in trainer._hooks if type(h).__name__ == "RefreshRepresentatives"]
    return hook


@pytest.mark.parametrize("rule", ["first_epoch", "every_epoch"])
def test_refreshes_where_an_epoch_begins(folder, tmp_path, rule):
    trainer = trainer_of(folder, tmp_path, "MODEL.REPMET.KMEANS", rule)
    hook, seen = refreshing(trainer), []
    epochs = [hook.images.epoch_of(4 * i) for i in range(6)]
    hook.refresh = lambda first: seen.append(first // 4)
    for trainer.iter in range(6):
        hook.before_step()
    begins = [i for i in range(6) if i == 0 or epochs[i] != epochs[i - 1]]
    assert seen == ([0] if rule == "first_epoch" else begins) and len(begins) > 2


def test_centres_are_the_means_of_what_covers_each_class(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path)
    hook, model = refreshing(trainer), trainer.checkpointer.model
    before = model.predictor.representatives.detach().clone()
    hook.refresh(0)
    assert model.training
    model.eval()
    gathered = {}
    for number in range(8):
        query = hook.images[number]
        with torch.no_grad():
            (described,) = model.describe_queries([query])
            unit = F.normalize(model.predictor.embedding(described.x), dim=1)
        overlaps = pairwise_iou(query["instances"].gt_boxes, described.proposals.proposal_boxes)
        for label, row in zip(query["instances"].gt_classes.tolist(), overlaps, strict=True):
            gathered.setdefault(label, []).append(unit[row >= 0.7])
    after = model.predictor.representatives.detach()
    refreshed = 0
    for label in range(4):
        points = torch.cat(gathered.get(label, [torch.zeros(0, 6)]))
        if len(points) < 3:
            assert torch.equal(after[label], before[label])
            continue
        refreshed += 1
        nearest = torch.cdist(points, after[label]).argmin(dim=1)
        for mode in range(3):
            mean = points[nearest == mode].mean(dim=0)
            torch.testing.assert_close(after[label, mode], mean, atol=1e-4, rtol=1e-3)
    assert refreshed, "the comparison needs a class with enough proposals"


@pytest.mark.parametrize("wanted", [1, 3, 10**6])
def test_reads_images_until_every_class_has_enough_objects(
    rng, folder, tmp_path, monkeypatch, wanted
):
    hook, seen = refreshing(trainer_of(folder, tmp_path)), []
    monkeypatch.setattr("fewshot_d2.systems.repmet.refresh._OBJECTS_A_CLASS", wanted)

    def objects_of_all_classes(query):
        seen.append(query["episode_id"])
        return [(label, torch.rand(1, 6, generator=rng)) for label in (0, 1, 2, 3, 3)]

    hook._embeddings_on_objects = objects_of_all_classes
    hook.refresh(2)
    epoch = [n for n in range(2, 30) if hook.images.epoch_of(n) == hook.images.epoch_of(2)]
    assert seen == epoch[:wanted] and len(epoch) > 3


def test_all_processes_take_the_centres_of_the_first(folder, tmp_path, monkeypatch):
    hook = refreshing(trainer_of(folder, tmp_path))
    modes = hook.model.predictor.representatives

    def broadcast(tensor, src):
        assert src == 0 and tensor.shape == modes.shape
        tensor.fill_(7)

    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.broadcast", broadcast)
    hook.refresh(0)
    assert (modes == 7).all()


def test_resumed_run_ends_as_an_uninterrupted_one(folder, tmp_path):
    whole = trainer_of(folder, tmp_path / "whole")
    whole.train()
    part = trainer_of(folder, tmp_path / "part", "SOLVER.CHECKPOINT_PERIOD", 2)
    part.max_iter = 3
    part.train()
    resumed = trainer_of(folder, tmp_path / "part")
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 3
    resumed.train()
    expected = whole.checkpointer.model.state_dict()
    for name, tensor in resumed.checkpointer.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_off_by_default_and_refused_where_it_has_no_meaning(folder, tmp_path):
    model = tiny_repmet()
    assert model.training_hooks(None, 4) == []
    with pytest.raises(ValueError, match="REPMET.KMEANS must be one of"):
        tiny_repmet("MODEL.REPMET.KMEANS", "always")
    linear = tiny_repmet(
        *("MODEL.REPMET.KMEANS", "first_epoch", "MODEL.REPMET.CLASSIFIER", "linear"),
    )
    with pytest.raises(ValueError, match="REPMET.KMEANS must be 'none' unless"):
        linear.training_hooks(object(), 4)
