"""Pre-training on pairs of examples: its loss, its data, and what it leaves in a detector."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, MetadataCatalog
from factories import tiny_config, tiny_model, write_set
from torch.utils.data import DataLoader

from fewshot_d2.data.coco_json import register_instances
from fewshot_d2.data.loaders import build_training_episodes
from fewshot_d2.data.support_pairs import SupportPairs
from fewshot_d2.engine.pretrain import pretrain_supports
from fewshot_d2.modeling.losses import support_contrast

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
    register_instances(NAME, str(tmp_path / "instances.json"), str(tmp_path))
    yield tmp_path
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def config(*more):
    return tiny_config(
        *("DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (), "FEWSHOT.SPLIT", "novel:b"),
        *("FEWSHOT.SUPPORT.DATASET_TRAIN", "", "FEWSHOT.PRETRAIN.MAX_ITER", 3),
        *("MODEL.RESNETS.NORM", "FrozenBN", *more),
    )


def test_pairs_are_other_examples_of_the_same_base_classes(folder):
    pairs = SupportPairs(build_training_episodes(config()), num_classes=3)
    for number in range(30):
        first, second = pairs.pair(number)
        assert first.class_ids == second.class_ids and set(first.class_ids) == {5, 12, 90}
        for (one,), (other,) in zip(first.examples, second.examples, strict=True):
            # Pictures are noise, so only the very same crop has the same pixels.
            assert not torch.equal(one.image, other.image)


def test_pairs_are_the_same_for_any_number_of_workers(folder):
    pairs = SupportPairs(build_training_episodes(config()), num_classes=2)
    seen = []
    for workers in (0, 1, 2):
        loader = iter(DataLoader(pairs, None, num_workers=workers, collate_fn=lambda pair: pair))
        seen.append([next(loader) for _ in range(5)])
    for other in seen[1:]:
        for pair, twin in zip(seen[0], other, strict=True):
            for ours, theirs in zip(pair, twin, strict=True):
                assert ours.class_ids == theirs.class_ids
                assert all(
                    torch.equal(a.image, b.image)
                    for (a,), (b,) in zip(ours.examples, theirs.examples, strict=True)
                )


def test_one_class_cannot_be_compared(folder):
    episodes = build_training_episodes(config("FEWSHOT.SPLIT", "novel:b,c,d"))
    with pytest.raises(ValueError, match="at least 2 classes"):
        SupportPairs(episodes, num_classes=8)


def test_weights_and_statistics_reach_the_frozen_model_and_heads_stay(folder):
    cfg = config()
    model = tiny_model("MODEL.RESNETS.NORM", "FrozenBN")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pretrain_supports(cfg, model, build_training_episodes(cfg))
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.startswith("backbone.") for name in moved)
    for part in ("conv1.weight", "norm.running_mean", "norm.running_var", "fpn_output2.weight"):
        assert any(name.endswith(part) for name in moved), part
    assert not any(type(m).__name__.startswith("BatchNorm") for m in model.modules())


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
