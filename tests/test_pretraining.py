"""Pre-training on pairs of examples: its loss, its data, and what it leaves in a detector."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog
from factories import random_support_set, registered_set, tiny_config, tiny_model, write_set
from PIL import Image
from torch.utils.data import DataLoader

from fewshot_d2 import Support
from fewshot_d2.checkpoint import FewShotCheckpointer
from fewshot_d2.data.coco_json import register_instances
from fewshot_d2.data.loaders import build_training_episodes
from fewshot_d2.data.support_pairs import SupportPairs
from fewshot_d2.engine import pretrain, trainer
from fewshot_d2.engine.pretrain import pretrain_supports
from fewshot_d2.modeling.losses import support_contrast
from fewshot_d2.transforms import SupportCrop

NAME = "pretraining_test_set"
TEMPERATURE = 0.1


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


@pytest.fixture
def folder(tmp_path):
    write_set(tmp_path)
    with registered_set(NAME, tmp_path):
        yield tmp_path


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


def test_whole_supports_are_compared_in_their_images(folder):
    """Where detection sees whole supports, a pair is two resized images with the boxes of the examples."""
    episodes = build_training_episodes(
        config(
            *("FEWSHOT.SUPPORT.FORM", "whole", "FEWSHOT.RESIZE_RULE", "stretch"),
            *("INPUT.MAX_SIZE_TRAIN", 96),
        )
    )
    category = {i: c for c, i in episodes.factory.contiguous_ids.items()}
    annotations = [(d, a) for d in DatasetCatalog.get(NAME) for a in d["annotations"]]
    pairs = SupportPairs(episodes, num_classes=3)
    for support_set in pairs.pair(5):
        for class_id, (support,) in zip(support_set.class_ids, support_set.examples, strict=True):
            sources = set()
            for record, annotation in annotations:
                x, y, width, height = annotation["bbox"]
                scale = torch.tensor([96 / record["width"], 96 / record["height"]]).repeat(2)
                box = torch.tensor([x, y, x + width, y + height]) * scale
                if torch.allclose(box, support.box, atol=1e-3):
                    sources.add(category[annotation["category_id"]])
            assert class_id in sources and support.image.shape == (3, 96, 96)
    first = next(iter(DataLoader(pairs, None, num_workers=1, collate_fn=lambda pair: pair)))
    assert_same_pair(first, pairs.pair(0))


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
    episodes = build_training_episodes(config("FEWSHOT.SPLIT", "novel:b,c,d"))
    with pytest.raises(ValueError, match="at least 2 base classes"):
        SupportPairs(episodes, num_classes=8)


def test_weights_and_statistics_reach_the_frozen_model_and_heads_stay(folder, monkeypatch):
    twins = []
    build = pretrain.build_model
    monkeypatch.setattr(pretrain, "build_model", lambda cfg: twins.append(build(cfg)) or twins[-1])
    cfg = config("MODEL.BACKBONE.FREEZE_AT", 2)
    model = tiny_model("MODEL.RESNETS.NORM", "FrozenBN")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pretrain_supports(cfg, model, build_training_episodes(cfg))
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
    monkeypatch.setattr(trainer, "pretrain_supports", lambda *_: pytest.fail("pre-trained over"))
    weights = str(tmp_path / "given" / "model.pth")
    cfg = config("MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", 1)
    run = trainer.EpisodicTrainer(cfg)
    run.resume_or_load(resume=False)
    run.train()


def pretrain_part(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    register_instances(NAME, str(folder / "instances.json"), str(folder))
    cfg = config()
    model = tiny_model("MODEL.RESNETS.NORM", "FrozenBN")
    pretrain_supports(cfg, model, build_training_episodes(cfg))
    torch.save(model.state_dict(), folder / f"rank{rank}.pth")
    dist.destroy_process_group()


def test_processes_end_with_the_same_weights_and_statistics(folder):
    mp.spawn(pretrain_part, (folder,), nprocs=2)
    first, second = (torch.load(folder / f"rank{rank}.pth") for rank in range(2))
    start = tiny_model("MODEL.RESNETS.NORM", "FrozenBN").state_dict()
    assert any(not torch.equal(start[name], first[name]) for name in first)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=0, rtol=0, msg=name)
