"""Hard patches: what is kept, what is written and read, what is trained on, and the hook with a model made for it."""

import dataclasses
import json
import types
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage
from factories import set_fixture, tiny_config
from PIL import Image
from torch import nn

from fewshot_d2.data.loaders import EpisodicTrainLoader, build_training_episodes
from fewshot_d2.data.patch_pool import KINDS, HardPatch, PatchPool, with_class
from fewshot_d2.engine import EpisodicTrainer
from fewshot_d2.engine.patch_mining import HardPatchMining, worst_patches
from fewshot_d2.structures import SupportFeatures

NAME = "mining_set"
SIZE = 32


@META_ARCH_REGISTRY.register()
class FakeMiner(nn.Module):
    """Losses that are written down: every box of a query is a "pos" and a "pos_loc", every class a "neg"."""

    def __init__(self, cfg):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls, self.encoded, self.windows = [], [], []

    def forward(self, batched_inputs):
        self.windows.append([q["image"].double().sum().item() for q in batched_inputs])
        return {"loss_fake": self.weight.sum() * 0 + (self.weight - 1).square().sum()}

    def encode_support(self, support_sets):
        (support_set,) = support_sets
        self.encoded.append(support_set.class_ids[0])
        return SupportFeatures({"x": torch.zeros(1, 2)}, support_set.class_ids, system="FakeMiner")

    def hard_patches(self, batched_inputs):
        assert not self.training and not torch.is_grad_enabled()
        return [self._of(query) for query in batched_inputs]

    def _of(self, query):
        ids = query["support_features"].class_ids
        self.calls.append((query["image_id"], tuple(query["image"].shape[1:]), tuple(ids)))
        rows = []
        for box, k in zip(query["instances"].gt_boxes.tensor, query["instances"].gt_classes):
            corner = box[:2].round().tolist()
            for kind, loss in ((1, 0.5 + corner[0] / 100), (2, 0.9)):
                rows.append((*corner, corner[0] + SIZE, corner[1] + SIZE, loss, kind, int(k)))
        for k in range(len(ids)):
            rows.append((0, 0, SIZE, SIZE, 0.1 + k / 100, 0, k))
            rows.append((0, 0, SIZE, SIZE, 0.0, 0, k))
        table = torch.tensor(rows)
        return {
            "boxes": table[:, :4],
            "losses": table[:, 4],
            "kind": table[:, 5].long(),
            "classes": table[:, 6].long(),
        }


folder = set_fixture(NAME)


def config(folder, *overrides, out="out"):
    return tiny_config(
        *("DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (), "FEWSHOT.SUPPORT.DATASET_TRAIN", ""),
        *("FEWSHOT.SUPPORT.DATASETS_TEST", (), "FEWSHOT.MAPPER", "PatchMapper"),
        *("FEWSHOT.PATCHES.SIZE", SIZE, "FEWSHOT.MINING.PERIOD", 3, "MODEL.MASK_ON", False),
        *("MODEL.META_ARCHITECTURE", "FakeMiner", "OUTPUT_DIR", str(folder / out)),
        *("SOLVER.IMS_PER_BATCH", 4, "FEWSHOT.NUM_WAYS", 4, "FEWSHOT.SPLIT", "novel:b"),
        *("TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.MAX_ITER", 8),
        *("SOLVER.WARMUP_ITERS", 0, *overrides),
    )


def naive_worst(boxes, losses, kind, nms_iou, number):
    kept = []
    for wanted in range(len(KINDS)):
        chosen = []
        for i in sorted(range(len(losses)), key=lambda i: -losses[i]):
            if kind[i] != wanted or losses[i] <= 0 or len(chosen) == number:
                continue
            overlaps = [pairwise_iou(Boxes(boxes[[i]]), Boxes(boxes[[j]])).item() for j in chosen]
            if all(overlap <= nms_iou for overlap in overlaps):
                chosen.append(i)
        kept += chosen
    return kept


def test_worst_patches_equal_loops(rng):
    for number in (1, 3, 100):
        corner = torch.randint(0, 6, (120, 2), generator=rng) * 8.0
        boxes = torch.cat([corner, corner + 20], dim=1)
        # No two losses are equal, some are no losses.
        losses = (torch.randperm(120, generator=rng) - 20).clamp(min=0) / 100.0
        kind = torch.randint(0, 3, (120,), generator=rng)
        found = worst_patches(boxes, losses, kind, nms_iou=0.5, number=number)
        assert found.tolist() == naive_worst(boxes, losses, kind, 0.5, number)
    nothing = worst_patches(boxes[:0], losses[:0], kind[:0], nms_iou=0.5, number=3)
    assert nothing.tolist() == []


PATCH = HardPatch(100, 5, (-4, 0, 28, 32), 0.5, "neg")


def test_pool_is_kept_in_a_file(tmp_path):
    other = dataclasses.replace(PATCH, kind="pos_loc", image_id=7)
    pool = PatchPool(40, (PATCH, other, dataclasses.replace(other, kind="pos")))
    path = pool.save(tmp_path)
    assert path == PatchPool.path(tmp_path, 40) and PatchPool.load(path) == pool
    assert dict(pool.by_image) == {(100, True): (PATCH,), (7, False): pool.patches[1:]}
    assert PatchPool.load(PatchPool(1, ()).save(tmp_path)).patches == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patches": [[1, 2, [0, 0, 5, 5], 0.5]]}, r"patches\[0\] must be \[image, class"),
        ({"patches": [[1, 2, [0, 0, 5, 5], 0.5, "bad"]]}, "kind must be one of"),
        ({"patches": [[1, 2, [5, 0, 5, 5], 0.5, "neg"]]}, "window must be XYXY with an area"),
        ({"patches": [["1", 2, [0, 0, 5, 5], 0.5, "neg"]]}, "id must be of type int"),
        ({"patches": [[1, 2, [0, 0, 5], 0.5, "neg"]]}, "four numbers"),
        ({"iteration": "1"}, "iteration must be of type int"),
        ({"version": 9}, "format must be"),
    ],
)
def test_file_that_is_no_pool_is_refused(tmp_path, change, message):
    path = PatchPool(1, (PATCH,)).save(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=f"{path.name} must be a file of hard patches.*{message}"):
        PatchPool.load(path)


@pytest.mark.parametrize(
    ("classes", "class_id", "limits", "expected"),
    [
        ((1, 2, 8), 3, (3, 1), (1, 2, 3, 8)),
        ((1, 2, 8), 3, (2, 1), (1, 3, 8)),
        ((1, 8), 3, (1, 1), (3, 8)),
        ((1, 8, 9), 7, (1, 2), (1, 8, 7)),
        ((1, 8), 7, (1, 2), (1, 8, 7)),
        ((1,), 7, (1, 0), (1, 7)),
    ],
)
def test_mined_class_takes_a_place_of_its_kind(classes, class_id, limits, expected):
    assert with_class(classes, class_id, (1, 2, 3), *limits) == expected


def mined_episodes(folder, *overrides, patches=None):
    cfg = config(folder, *overrides)
    episodes = build_training_episodes(cfg)
    if patches is None:
        patches = [
            HardPatch(100 + i, class_id, (i, 1, i + SIZE, 1 + SIZE), 0.5, kind)
            for i in range(2, 12)
            for kind, class_id in (("neg", 90), ("pos", 5), ("pos_loc", 12))
        ]
    PatchPool(3, tuple(patches)).save(episodes.folder)
    return episodes


def test_each_second_episode_shows_a_negative_patch(folder):
    episodes = mined_episodes(folder, "FEWSHOT.NUM_WAYS", 1, "FEWSHOT.NUM_ABSENT_WAYS", 1)
    assert all(episodes.sample(number).window is None for number in range(12))
    classes = Counter()
    for number in range(12, 92):
        # Pools of later iterations do not exist: 6 * 4 = 24 and more would ask for them.
        number = 12 + number % 12
        episode = episodes.sample(number)
        i = episode.query["image_id"] - 100
        assert episode.window == (i, 1, i + SIZE, 1 + SIZE)
        expected = {90} if number % 2 == 0 else {5, 12}
        forced = expected & set(episode.class_ids)
        assert forced and len(episode.class_ids) <= 2
        assert len(set(episode.class_ids)) == len(episode.class_ids) == len(episode.supports)
        assert episode == episodes.sample(number), "only the number decides"
        classes.update(forced)
        mapped = episodes[number]
        assert tuple(mapped["image"].shape[1:]) == (SIZE, SIZE)
        assert tuple(mapped["support"].class_ids) == episode.class_ids
    assert len(classes) == 3


def test_episodes_without_a_patch_of_their_own_are_random(folder, caplog):
    episodes = mined_episodes(folder, patches=[dataclasses.replace(PATCH, class_id=11)])
    plain = build_training_episodes(config(folder, "FEWSHOT.MINING.PERIOD", 0))
    # The only patch is of an image without ground truth and of a novel class.
    for number in (13, 14, 24, 40):
        assert episodes.sample(number) == plain.sample(number)
    assert "No hard patches in" in caplog.text and "00000006.json" in caplog.text


def hook_of(folder, *overrides, model=None):
    cfg = config(folder, *overrides)
    loader = EpisodicTrainLoader(cfg)
    hook = HardPatchMining(cfg, model or FakeMiner(cfg).train(), loader)
    hook.trainer = types.SimpleNamespace(iter=2, max_iter=8)
    return hook


def test_hook_writes_the_worst_patches_in_original_pixels(folder):
    hook = hook_of(folder, "FEWSHOT.MINING.SCALES", (1.0, 1.0), "FEWSHOT.MINING.NUM_SCALES", 1)
    hook.after_step()
    pool = PatchPool.load(PatchPool.path(folder / "out" / "hard_patches", 3))
    assert pool.iteration == 3 and hook.model.training
    by_kind = Counter(p.kind for p in pool.patches)
    images = hook.episodes.images
    # All classes propose the same negative window: the worst one, of the class in the last place, is left.
    assert by_kind["neg"] == len(images) and by_kind["pos"] >= len(images)
    for image_id, shape, ids in hook.model.calls:
        assert shape == (43, 64) and set(ids) == {5, 12, 90}, "no novel class is searched"
        (negative,) = [p for p in pool.patches if p.image_id == image_id and p.kind == "neg"]
        assert negative.class_id == ids[-1] and negative.loss == pytest.approx(0.12)
        assert negative.window == (0, 0, 30, 30)
        record = hook.episodes.factory.query_index.dicts[image_id - 100]
        corners = [a["bbox"][:2] for a in record["annotations"]]
        for patch in (p for p in pool.patches if p.image_id == image_id and p.kind != "neg"):
            distance = min(np.abs(np.subtract(c, patch.window[:2])).max() for c in corners)
            assert distance <= 1 and 29 <= patch.window[2] - patch.window[0] <= 31
    # Each class is encoded once.
    assert sorted(hook.model.encoded) == [5, 12, 90]


def test_hook_searches_at_several_scales_for_some_of_the_classes(folder):
    hook = hook_of(folder, "FEWSHOT.MINING.NUM_CLASSES", 1, "FEWSHOT.MINING.IMAGES", 4)
    hook.after_step()
    calls = hook.model.calls
    assert len(calls) == 8 and len({image for image, _, _ in calls}) == 4
    for one, two in zip(calls[::2], calls[1::2], strict=True):
        (image, shape, ids), (same, other, same_ids) = one, two
        assert image == same and ids == same_ids and shape != other
        own = hook.episodes.factory.query_index.classes_in(image - 100)
        assert ids[: len(own)] == own and len(ids) <= len(own) + 1
        assert all(64 * 0.5 - 1 <= s[1] <= 64 * 1.6 + 1 for s in (shape, other))


def test_hook_is_due_every_period_and_not_at_the_end(folder):
    hook = hook_of(folder)
    for iteration, due in ((0, False), (1, False), (3, False), (4, False), (5, True), (8, False)):
        hook.trainer = types.SimpleNamespace(iter=iteration, max_iter=9)
        hook.after_step()
        assert PatchPool.path(hook.episodes.folder, iteration + 1).exists() == due


def test_image_that_cannot_be_read_has_no_patches(folder, caplog):
    (folder / "5.png").write_bytes(b"no picture")
    hook = hook_of(folder)
    patches = hook.mine(3)
    assert 105 not in {p.image_id for p in patches} and "Not mined: " in caplog.text
    assert "5.png" in caplog.text and len({p.image_id for p in patches}) > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {**r, "losses": r["losses"][1:]}, "must give M boxes"),
        (lambda r: {**r, "kind": r["kind"] + 1}, "kind in 0..2"),
        (lambda r: {**r, "classes": r["classes"] - 1}, "classes in 0..2"),
        (lambda r: {**r, "losses": r["losses"] * torch.nan}, "finite boxes and losses"),
    ],
)
def test_bad_answers_of_a_model_are_refused(folder, change, message):
    hook = hook_of(folder)
    given = hook.model._of
    hook.model._of = lambda query: change(given(query))
    with pytest.raises(ValueError, match=message):
        hook.mine(3)


def test_model_without_hard_patches_is_refused(folder):
    with pytest.raises(ValueError, match="needs a model with hard_patches, got Linear"):
        hook_of(folder, model=nn.Linear(1, 1))


def trained(folder, out, *, stop=None, resume=False):
    cfg = config(folder, out=out)
    trainer = EpisodicTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    if stop:
        trainer.max_iter = stop
    trainer.train()
    return trainer.checkpointer.model.windows


def test_training_uses_each_pool_from_its_iteration_on_and_resumes(folder):
    whole = trained(folder, "whole")
    files = sorted(p.name for p in (folder / "whole/hard_patches").iterdir())
    assert files == ["00000003.json", "00000006.json"] and len(whole) == 8
    # What was trained on is what the episodes of those files give.
    episodes = build_training_episodes(config(folder, out="whole"))
    sums = [episodes[number]["image"].double().sum().item() for number in range(32)]
    assert sums == [value for batch in whole for value in batch]
    mined = [episodes.sample(number).window is not None for number in range(32)]
    assert not any(mined[:12]) and all(mined[12:])
    # Stopped between two pools, and begun again.
    first = trained(folder, "parts", stop=4)
    second = trained(folder, "parts", resume=True)
    assert first + second == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_that_is_restarted_reads_the_same_iteration_anew(folder, workers):
    loader = EpisodicTrainLoader(config(folder, "DATALOADER.NUM_WORKERS", workers))
    with EventStorage(0) as storage:
        batches = iter(loader)
        first = next(batches)
        storage.iter = 1
        second = next(batches)
        loader.restart()
        again = next(batches)
    assert [q["episode_id"] for q in first] == [0, 1, 2, 3]
    assert [q["episode_id"] for q in second] == [4, 5, 6, 7] == [q["episode_id"] for q in again]
    assert Image.open(first[0]["file_name"]).size == (60, 40)
