"""Pre-training on pairs or objects: losses, data, and what it leaves in a detector."""

import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, Instances
from factories import (
    random_support_set,
    registered_set,
    set_fixture,
    tiny_config,
    tiny_model,
    write_set,
)
from PIL import Image
from torch.utils.data import DataLoader

from fewshot_d2 import Support
from fewshot_d2.checkpoint import FewShotCheckpointer
from fewshot_d2.data.coco_json import register_instances
from fewshot_d2.data.loaders import build_training_episodes
from fewshot_d2.data.support_pairs import SupportPairs
from fewshot_d2.engine import pretrain, trainer
from fewshot_d2.engine.pretrain import (
    IGNORED,
    ObjectClassification,
    cell_targets,
    pretrain_detector,
)
from fewshot_d2.modeling.losses import support_contrast
from fewshot_d2.transforms import SupportCrop

NAME = "pretraining_test_set"
TEMPERATURE = 0.1
OBJECTS = ("FEWSHOT.PRETRAIN.TASK", "objects", "FEWSHOT.PRETRAIN.IMS_PER_BATCH", 4)


def naive_contrast(first, second, temperature):
    rows = [row.flatten() for row in (*first, *second)]
    mean = sum(rows) / len(rows)
    rows = [(row - mean) / (row - mean).norm() for row in rows]
    count, total = len(first), 0.0
    for ones, others in ((rows[:count], rows[count:]), (rows[count:], rows[:count])):
        for k, one in enumerate(ones):
            logits = [float(one @ other) / temperature for other in others]
            total += math.log(sum(math.exp(x) for x in logits)) - logits[k]
    return total / (2 * count)


@pytest.mark.parametrize("shape", [(2, 5), (6, 4), (3, 2, 3, 3)])
def test_contrast_equals_loops(rng, shape):
    first, second = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    loss = support_contrast(first, second, TEMPERATURE).item()
    assert loss == pytest.approx(naive_contrast(first, second, TEMPERATURE), rel=1e-9)


def test_contrast_is_blind_to_offset_and_scale_and_knows_perfection(rng):
    first, second = (torch.randn(5, 7, generator=rng, dtype=torch.float64) for _ in range(2))
    loss = support_contrast(first, second, TEMPERATURE)
    moved = support_contrast(3 * first + 2, 3 * second + 2, TEMPERATURE)
    torch.testing.assert_close(moved, loss)
    assert support_contrast(first, first, 0.001) < 1e-3 < loss


folder = set_fixture(NAME)


def config(*more):
    return tiny_config(
        *("DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (), "FEWSHOT.SPLIT", "novel:b"),
        *("FEWSHOT.SUPPORT.DATASETS_TEST", ()),
        *("FEWSHOT.SUPPORT.DATASET_TRAIN", "", "FEWSHOT.PRETRAIN.MAX_ITER", 3),
        *("MODEL.RESNETS.NORM", "FrozenBN", *more),
    )


def same_crop(support, record, annotation):
    x, y, width, height = (int(v) for v in annotation["bbox"])
    pixels = np.asarray(Image.open(record["file_name"]).convert("RGB"))[
        y : y + height, x : x + width
    ]
    raw = Support(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    return torch.equal(SupportCrop(size=32, min_size=32, rule="paper")(raw).image, support.image)


@pytest.mark.parametrize("form", ["crop", "image"])
def test_pairs_are_two_examples_of_the_same_base_classes(folder, form):
    """Pictures are noise, so a crop is known by its pixels."""
    episodes = build_training_episodes(config("FEWSHOT.SUPPORT.FORM", form))
    pairs = SupportPairs(episodes, num_classes=3)
    category = {i: c for c, i in episodes.factory.contiguous_ids.items()}
    annotations = [(d, a) for d in DatasetCatalog.get(NAME) for a in d["annotations"]]
    for number in range(8):
        first, second = pairs.pair(number)
        assert first.class_ids == second.class_ids and set(first.class_ids) == {5, 12, 90}
        for class_id, (one,), (other,) in zip(
            first.class_ids, first.examples, second.examples, strict=True
        ):
            assert not torch.equal(one.image, other.image)
            for support in (one, other):
                sources = {
                    category[a["category_id"]] for d, a in annotations if same_crop(support, d, a)
                }
                assert sources == {class_id}


def test_one_example_is_of_the_supports_and_one_of_the_queries(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("supports")
    write_set(other, seed=1)
    with registered_set(f"{NAME}_support", other):
        episodes = build_training_episodes(
            config("FEWSHOT.SUPPORT.DATASET_TRAIN", f"{NAME}_support")
        )
        first, second = SupportPairs(episodes, num_classes=3).pair(0)
        for support_set, name in ((first, f"{NAME}_support"), (second, NAME)):
            records = DatasetCatalog.get(name)
            for (support,) in support_set.examples:
                assert any(same_crop(support, d, a) for d in records for a in d["annotations"])


def test_processes_draw_their_own_pairs(folder, monkeypatch):
    episodes = build_training_episodes(config())
    monkeypatch.setattr("fewshot_d2.data.support_pairs.comm.get_rank", lambda: 1)
    monkeypatch.setattr("fewshot_d2.data.support_pairs.comm.get_world_size", lambda: 2)
    pairs = SupportPairs(episodes, num_classes=3)
    stream = iter(pairs)
    assert_same_pair(next(stream), pairs.pair(1))
    assert_same_pair(next(stream), pairs.pair(3))


def assert_same_pair(pair, other):
    for ours, theirs in zip(pair, other, strict=True):
        assert ours.class_ids == theirs.class_ids
        for (a,), (b,) in zip(ours.examples, theirs.examples, strict=True):
            assert torch.equal(a.image, b.image)


def test_class_in_one_image_only_is_left_out(folder):
    episodes = build_training_episodes(config())
    index = episodes.factory.query_index
    index._images[12] = index._images[12][:1]
    assert SupportPairs(episodes, num_classes=64).class_ids == [5, 90]


def test_pairs_are_the_same_for_any_number_of_workers(folder):
    pairs = SupportPairs(build_training_episodes(config()), num_classes=2)
    seen = []
    for workers in (0, 1, 2):
        loader = iter(DataLoader(pairs, None, num_workers=workers, collate_fn=lambda pair: pair))
        seen.append([next(loader) for _ in range(5)])
    for other in seen[1:]:
        for pair, twin in zip(seen[0], other, strict=True):
            assert_same_pair(pair, twin)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_worker_does_not_keep_a_file_open_for_every_crop(folder):
    """torch shares what a worker sends; a cache of shared tensors ends at the limit of open files."""
    pairs = SupportPairs(build_training_episodes(config()), num_classes=3)
    loader = iter(DataLoader(pairs, None, num_workers=1, collate_fn=lambda pair: pair))
    opened = []
    for _ in range(2):
        for _ in range(20):
            next(loader)
        opened.append(len(os.listdir(f"/proc/{loader._workers[0].pid}/fd")))
    assert opened[1] <= opened[0] + 12


def test_one_class_cannot_be_compared(folder):
    cfg = config("FEWSHOT.SPLIT", "novel:b,c,d", *OBJECTS)
    episodes = build_training_episodes(cfg)
    with pytest.raises(ValueError, match="at least 2 base classes, got 1"):
        pretrain_detector(cfg, tiny_model(), episodes)
    with pytest.raises(ValueError, match="at least 2 base classes"):
        SupportPairs(episodes, num_classes=8)


def test_weights_and_statistics_reach_the_frozen_model_and_heads_stay(folder, monkeypatch):
    twins = []
    build = pretrain.build_model
    monkeypatch.setattr(pretrain, "build_model", lambda cfg: twins.append(build(cfg)) or twins[-1])
    cfg = config("MODEL.BACKBONE.FREEZE_AT", 2)
    model = tiny_model("MODEL.RESNETS.NORM", "FrozenBN")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pretrain_detector(cfg, model, build_training_episodes(cfg))
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.startswith("backbone.") for name in moved)
    for part in (
        "stem.conv1.weight",
        "norm.running_mean",
        "norm.running_var",
        "fpn_output2.weight",
    ):
        assert any(name.endswith(part) for name in moved), part
    assert not any(type(m).__name__.startswith("BatchNorm") for m in model.modules())
    support = random_support_set(torch.Generator().manual_seed(0))
    with torch.no_grad():
        frozen, living = (m.eval().encode_support([support]).tensors for m in (model, twins[0]))
    for level, tensor in frozen.items():
        torch.testing.assert_close(tensor, living[level], atol=1e-5, rtol=1e-4)


def test_given_weights_are_not_pretrained_over(folder, tmp_path, monkeypatch):
    model = tiny_model("MODEL.RESNETS.NORM", "FrozenBN")
    FewShotCheckpointer(model, str(tmp_path / "given")).save("model")
    monkeypatch.setattr(trainer, "pretrain_detector", lambda *_: pytest.fail("pre-trained over"))
    weights = str(tmp_path / "given" / "model.pth")
    cfg = config("MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", 1)
    run = trainer.EpisodicTrainer(cfg)
    run.resume_or_load(resume=False)
    run.train()


class Ramps(Backbone):
    """Maps whose channels are the middle of each cell in pixels, x and y."""

    def output_shape(self):
        return {f"s{stride}": ShapeSpec(channels=2, stride=stride) for stride in (4, 8)}

    def forward(self, images):
        maps = {}
        for name, shape in self.output_shape().items():
            rows, columns = (torch.arange(side // shape.stride) for side in images.shape[2:])
            x, y = ((cells + 0.5) * shape.stride for cells in (columns, rows))
            ramps = torch.stack(torch.meshgrid(x, y, indexing="xy"))
            maps[name] = ramps.expand(len(images), -1, -1, -1)
        return maps


def objects_of(image_size, boxes, classes, difficult=None):
    objects = Instances(image_size)
    objects.gt_boxes, objects.gt_classes = Boxes(torch.as_tensor(boxes)), torch.as_tensor(classes)
    if difficult is not None:
        objects.gt_difficult = torch.as_tensor(difficult)
    return objects


def naive_targets(objects, size, stride, background):
    """Cell by cell: what ``cell_targets`` says in words."""
    columns, rows = ([(i + 0.5) * stride for i in range(n)] for n in (size[1], size[0]))
    targets = [[background] * size[1] for _ in range(size[0])]
    middles = {}
    labels = objects.gt_classes.tolist()
    if objects.has("gt_difficult"):
        both = zip(labels, objects.gt_difficult.tolist(), strict=True)
        labels = [IGNORED if difficult else label for label, difficult in both]
    by_area = sorted(
        zip(objects.gt_boxes.tensor.tolist(), labels, strict=True),
        key=lambda o: -(o[0][2] - o[0][0]) * (o[0][3] - o[0][1]),
    )
    for (x1, y1, x2, y2), label in by_area:
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        reach_x = max((x2 - x1) / 4, min(abs(c - x) for c in columns))
        reach_y = max((y2 - y1) / 4, min(abs(r - y) for r in rows))
        for i, r in enumerate(rows):
            for j, c in enumerate(columns):
                if x1 <= c <= x2 and y1 <= r <= y2:
                    targets[i][j] = IGNORED
                if abs(c - x) <= reach_x and abs(r - y) <= reach_y:
                    middles[i, j] = label
    height, width = objects.image_size
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            if r >= height or c >= width:
                targets[i][j] = IGNORED
    for (i, j), label in middles.items():
        targets[i][j] = label
    return targets


@pytest.mark.parametrize("stride", [4, 300 / 38])
@pytest.mark.parametrize("number", [0, 1, 7])
def test_targets_of_cells_equal_loops(rng, stride, number):
    size = (9, 12)
    corners = torch.rand(number, 2, generator=rng) * 30
    sides = 1 + torch.rand(number, 2, generator=rng) * 40
    classes = torch.randint(0, 5, (number,), generator=rng)
    difficult = torch.arange(number) % 3 == 1
    objects = objects_of((25, 40), torch.cat([corners, corners + sides], dim=1), classes, difficult)
    targets = cell_targets(objects, size, stride, background=5)
    assert targets.tolist() == naive_targets(objects, size, stride, 5)
    found = set(targets.flatten().tolist())
    assert {5, IGNORED} <= found and (number == 0 or set(classes[~difficult].tolist()) & found)


def test_an_object_without_a_cell_in_its_middle_has_the_nearest_one():
    """Also one behind the border; the smaller object has a cell of both."""
    boxes = [[5.0, 5.0, 6.0, 6.0], [40.0, 9.0, 44.0, 11.0], [0.0, 0.0, 16.0, 16.0]]
    targets = cell_targets(objects_of((32, 32), boxes, [1, 2, 0]), (4, 4), 8, background=3)
    assert targets.tolist() == [[1, 0, 3, 3], [0, 0, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3]]


@torch.no_grad()
def test_cells_are_classified_by_cosines_as_in_loops(rng):
    """What is classified is known: centres of cells, in images of two shapes; one object is difficult."""
    model = tiny_model()
    model.backbone = Ramps()
    learner = ObjectClassification(model, num_classes=3, temperature=TEMPERATURE)
    first = objects_of((40, 64), [[4.0, 8.0, 20.0, 12.0], [10.0, 10.0, 50.0, 30.0]], [2, 0])
    boxes = [[8.0, 8.0, 24.0, 56.0], [30.0, 50.0, 80.0, 90.0]]
    second = objects_of((64, 48), boxes, [1, 1], difficult=[False, True])
    batch = [
        {"image": torch.zeros(3, *i.image_size, dtype=torch.uint8), "instances": i}
        for i in (first, second)
    ]
    losses = learner(batch)
    for level, classifier in learner.classifiers.items():
        stride, rows = int(level[1:]), classifier.tolist()
        objects, background = [], []
        for of_image in (first, second):
            size = (64 // stride, 64 // stride)
            targets = naive_targets(of_image, size, stride, background=3)
            for i, j in itertools.product(range(size[0]), range(size[1])):
                if targets[i][j] != IGNORED:
                    cell = (j + 0.5) * stride, (i + 0.5) * stride
                    loss = naive_cosine_loss(cell, rows, targets[i][j])
                    (background if targets[i][j] == 3 else objects).append(loss)
        wanted = np.mean(objects), 0.3 * np.mean(background)
        got = losses[f"loss_object_{level}"].item(), losses[f"loss_background_{level}"].item()
        assert got == pytest.approx(wanted, rel=1e-4)
    assert len(losses) == 4
    nothing = learner([{**x, "instances": x["instances"][:0]} for x in batch])
    assert all((loss == 0) == ("object" in name) for name, loss in nothing.items())


def naive_cosine_loss(vector, others, label):
    cosines = [
        sum(a * b for a, b in zip(vector, other, strict=True))
        / math.hypot(*vector)
        / math.hypot(*other)
        for other in others
    ]
    return math.log(sum(math.exp((c - cosines[label]) / TEMPERATURE) for c in cosines))


def test_pretraining_on_objects_sees_base_classes_only(folder, monkeypatch):
    """Every object of the images that are seen is one of a base class, and all of these are there."""
    seen = []
    forward = ObjectClassification.forward

    def spy(self, batch):
        # And background.
        assert all(len(weight) == 4 for weight in self.classifiers.values())
        seen.extend(batch)
        return forward(self, batch)

    monkeypatch.setattr(ObjectClassification, "forward", spy)
    cfg = config(*OBJECTS)
    model = tiny_model("MODEL.RESNETS.NORM", "FrozenBN")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    episodes = build_training_episodes(cfg)
    pretrain_detector(cfg, model, episodes)
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("backbone.") for name in moved)
    # Three steps.
    assert len(seen) == 12
    base = [5, 12, 90]
    contiguous = [episodes.factory.contiguous_ids[c] for c in base]
    records = {d["file_name"]: d for d in DatasetCatalog.get(NAME)}
    for mapped in seen:
        height, width = mapped["image"].shape[1:]
        wanted = []
        for a in records[mapped["file_name"]]["annotations"]:
            if a["category_id"] in contiguous and not a.get("iscrowd"):
                x, y, w, h = a["bbox"]
                scale = np.array([width / mapped["width"], height / mapped["height"]] * 2)
                box = np.array([x, y, x + w, y + h]) * scale
                wanted.append((contiguous.index(a["category_id"]), *box.round(2).tolist()))
        found = mapped["instances"]
        boxes = found.gt_boxes.tensor.tolist()
        got = [
            (label, *np.round(box, 2).tolist())
            for label, box in zip(found.gt_classes.tolist(), boxes, strict=True)
        ]
        assert [g[0] for g in sorted(got)] == [w[0] for w in sorted(wanted)]
        np.testing.assert_allclose(sorted(got), sorted(wanted), atol=0.05)


def pretrain_part(rank, folder, task):
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    register_instances(NAME, str(folder / "instances.json"), str(folder))
    cfg = config("FEWSHOT.PRETRAIN.TASK", task, "FEWSHOT.PRETRAIN.IMS_PER_BATCH", 4)
    model = tiny_model("MODEL.RESNETS.NORM", "FrozenBN")
    pretrain_detector(cfg, model, build_training_episodes(cfg))
    torch.save(model.state_dict(), folder / f"rank{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.parametrize("task", ["pairs", "objects"])
def test_processes_end_with_the_same_weights_and_statistics(folder, task):
    mp.spawn(pretrain_part, (folder, task), nprocs=2)
    first, second = (torch.load(folder / f"rank{rank}.pth") for rank in range(2))
    start = tiny_model("MODEL.RESNETS.NORM", "FrozenBN").state_dict()
    assert any(not torch.equal(start[name], first[name]) for name in first)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=0, rtol=0, msg=name)
