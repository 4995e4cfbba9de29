"""OS2D as a detector: supports, pyramid, merging, training, patches, odd input and the converter."""

import dataclasses
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from factories import ROOT, random_query, random_support, random_support_set
from PIL import Image
from test_os2d_losses import naive_chunks, naive_nms
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fewshot_d2 import Support, SupportFeatures, SupportSet, load_config
from fewshot_d2.checkpoint import FewShotCheckpointer
from fewshot_d2.support_augmentation import SupportAugmentation
from fewshot_d2.systems.os2d import geometry
from fewshot_d2.systems.os2d.detections import Merging
from fewshot_d2.systems.os2d.matchers import unit_maps
from fewshot_d2.systems.os2d.patches import patches_around
from fewshot_d2.systems.os2d.release import convert, convert_file

CONFIGS = ROOT / "configs/os2d"
# An untrained narrow ResNet; class images of 48 pixels, so 3 x 3 cells before they are resized.
TINY = [
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.RESNETS.STEM_OUT_CHANNELS", 4),
    *("MODEL.OS2D.CLASS_SIZE", 48, "MODEL.OS2D.IMAGE_SIZE", 0, "MODEL.OS2D.PYRAMID", (1.0,)),
    *("FEWSHOT.PAIRS_PER_CHUNK", 2),
]


def tiny(version="v1", *overrides, seed=0):
    """A seeded random model in inference mode whose alignments differ from the identity."""
    torch.manual_seed(seed)
    cfg = load_config(str(CONFIGS / f"R_50_grozi_{version}.yaml"), [*TINY, *overrides])
    model = build_model(cfg).eval()
    if getattr(model.matcher, "transform_net", None) is not None:
        nn.init.normal_(model.matcher.transform_net.linear.weight, std=0.01)
    return model


def large_objects(query, side=240, offset=8):
    """The query with objects as large as an anchor."""
    ways = len(query["support"])
    instances = Instances(tuple(query["image"].shape[1:]))
    corner = offset * torch.arange(ways)[:, None].repeat(1, 4).float()
    instances.gt_boxes = Boxes(corner + torch.tensor([0.0, 0, side, side]))
    instances.gt_classes = torch.arange(ways)
    return {**query, "instances": instances}


def joined(first, second):
    """Classes of both sets."""
    ids = list(range(len(first) + len(second)))
    return SupportSet(ids, [str(i) for i in ids], first.examples + second.examples)


@torch.no_grad()
def test_supports_are_encoded_one_by_one_at_an_area(rng):
    model = tiny()
    support = random_support_set(rng, ways=3, shots=2)
    support.examples[1].pop()
    features = model.encode_support([support])
    assert features.tensors["valid"].tolist() == [[1, 1], [1, 0], [1, 1]]
    assert not features.tensors["cells"][1, 1].any()
    image = support.examples[2][1].image
    assert features.tensors["sizes"][2, 1] == (image.shape[1] * image.shape[2]) ** 0.5
    size = model.scales.class_image(tuple(image.shape[1:]))
    maps = model.backbone(model._resized(image, size)[None])["res4"]
    cells = nn.functional.interpolate(maps, (15, 15), mode="bilinear", align_corners=True)
    units = unit_maps(cells)[0]
    found = features.tensors["cells"][2, 1]
    for row, column in ((0, 0), (3, 11), (14, 2)):
        assert_close(found[column * 15 + row], units[:, row, column], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_resizing_is_that_of_pillow(rng):
    model = tiny()
    image = torch.randint(0, 256, (3, 50, 70), generator=rng, dtype=torch.uint8)
    for size in ((20, 31), (90, 100)):
        wanted = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], Image.BILINEAR)
        found = model._resized(image, size) * model.pixel_std + model.pixel_mean
        wanted = torch.from_numpy(np.array(wanted)).permute(2, 0, 1)
        assert (found - wanted).abs().max() < 1.01


def naive_candidates(model, query, features, k, shots):
    """Clipped boxes and scores of a class, for each class image and level in turn, by one matcher call each."""
    original = torch.tensor([query["width"], query["height"]] * 2)
    parts = []
    for shot in shots:
        for size in model.scales.levels(tuple(query["image"].shape[1:]), (0, 0), []):
            maps = unit_maps(model.backbone(model._resized(query["image"], size)[None])["res4"])
            images = {name: features.tensors[name][k, shot][None] for name in model.matcher.tensors}
            found = model.matcher(images, maps, [1])
            limit = torch.tensor([size[1], size[0]] * 2)
            clipped = found.boxes[0].clamp(min=0).minimum(limit)
            kept = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
            parts.append(((clipped * original / limit)[kept], found.scores[0][kept]))
    return parts


def naive_detections(model, query, features, k, shots):
    """Boxes of a class by NMS in a loop."""
    parts = naive_candidates(model, query, features, k, shots)
    boxes, scores = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    kept = naive_nms(boxes, scores.tolist(), 0.3)
    return boxes[kept], scores[kept]


@pytest.mark.parametrize("version", ["v1", "v2"])
@torch.no_grad()
def test_levels_and_class_images_are_merged_before_nms(rng, version):
    model = tiny(version, "MODEL.OS2D.PYRAMID", (0.5, 1.0, 1.4))
    support = random_support_set(rng, ways=3, shots=2)
    support.examples[1].pop()
    query = {**random_query(rng, support), "height": 96, "width": 128}
    found = model([query])[0]["instances"]
    features = model.encode_support([support])
    assert found.image_size == (96, 128)
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)
    for k, shots in enumerate(([0, 1], [0], [0, 1])):
        boxes, scores = naive_detections(model, query, features, k, shots)
        of_class = found[found.pred_classes == k]
        assert_close(of_class.scores, scores, atol=1e-6, rtol=0)
        assert_close(of_class.pred_boxes.tensor, boxes, atol=1e-3, rtol=0)


@pytest.mark.parametrize("chunk", [1, 2, 100])
@torch.no_grad()
def test_chunks_batches_and_stored_features_change_nothing(rng, chunk):
    model = tiny("v1", "FEWSHOT.PAIRS_PER_CHUNK", chunk)
    queries = [
        random_query(rng, random_support_set(rng, ways=w), side=s) for w, s in ((3, 64), (2, 80))
    ]
    together = [out["instances"] for out in model(queries)]
    for query, found in zip(queries, together, strict=True):
        features = model.encode_support([query["support"]])
        stored = {**query, "support_features": SupportFeatures.cat([features])}
        del stored["support"]
        (alone,) = model([stored])
        assert_close(found.scores, alone["instances"].scores, atol=1e-6, rtol=0)
        assert torch.equal(found.pred_classes, alone["instances"].pred_classes)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@torch.no_grad()
def test_nms_in_chunks_takes_class_images_one_by_one_each_with_its_levels(rng, chunk):
    """Whatever is matched at once."""
    keys = ("MODEL.OS2D.PYRAMID", (0.7, 1.0), "MODEL.OS2D.NMS_CHUNK", 5)
    model = tiny("v1", "FEWSHOT.PAIRS_PER_CHUNK", chunk, *keys)
    # Small boxes, few of which overlap.
    model.matcher.transform_net.linear.bias.copy_(torch.tensor([0.15, 0, 0.15, 0]))
    query = random_query(rng, random_support_set(rng, ways=2, shots=3), side=128)
    found = model([query])[0]["instances"]
    features = model.encode_support([query["support"]])
    wrong = 0
    for k in range(2):
        images = naive_candidates(model, query, features, k, [0, 1, 2])
        boxes, scores = (torch.cat(parts) for parts in zip(*images, strict=True))
        kept = naive_chunks(boxes, scores, 0.3, 5)
        of_class = found[found.pred_classes == k]
        assert_close(of_class.scores, scores[kept].sort(descending=True).values, atol=1e-6, rtol=0)
        # Level by level, all class images of each, is another order and gives other boxes.
        boxes, scores = (
            torch.cat(parts) for parts in zip(*(images[::2] + images[1::2]), strict=True)
        )
        other = scores[naive_chunks(boxes, scores, 0.3, 5)].sort(descending=True).values
        wrong += len(other) != len(kept) or not torch.allclose(other, of_class.scores, atol=1e-6)
    assert wrong


@torch.no_grad()
def test_corners_are_in_pixels_of_the_original(rng):
    model = tiny("v1", "MODEL.OS2D.TRANSFORM", "none")
    query = random_query(rng, random_support_set(rng, ways=1), side=64)
    found = model([{**query, "height": 128, "width": 64}])[0]["instances"]
    corners = found.pred_corners
    assert_close(corners[:, 2] - corners[:, 0], torch.full((len(found),), 240.0))
    assert_close(corners[:, 5] - corners[:, 1], torch.full((len(found),), 480.0))
    boxes = torch.stack([corners[:, 0].clamp(min=0), corners[:, 1].clamp(min=0)], dim=1)
    assert_close(found.pred_boxes.tensor[:, :2], boxes)


@torch.no_grad()
def test_best_boxes_before_and_after_nms_by_key(rng):
    model = tiny()
    query = random_query(rng, random_support_set(rng), side=80)
    every = model([query])[0]["instances"]
    few = tiny("v1", "TEST.DETECTIONS_PER_IMAGE", 1)([query])[0]["instances"]
    assert [int((few.pred_classes == k).sum()) for k in (0, 1)] == [1, 1]
    assert few.scores[0] == every.scores[0]
    threshold = every.scores.median().item()
    likely = tiny("v1", "MODEL.OS2D.SCORE_THRESHOLD", threshold)([query])[0]["instances"]
    assert len(likely) and likely.scores.min() > threshold
    first = tiny("v1", "MODEL.OS2D.PRE_NMS_TOPK", 1)([query])[0]["instances"]
    assert_close(first.scores, few.scores)


@pytest.mark.parametrize(
    "overrides",
    [[], ["MODEL.OS2D.LOSS", "contrastive", "MODEL.OS2D.MARGINS", (1.0, 0.5)]],
    ids=["ranked_list", "contrastive"],
)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_losses_of_queries_of_several_sizes(rng, version, overrides):
    model = tiny(version, *overrides).train()
    assert not any(m.training for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d))
    assert model.matcher.transform_net.conv[1].training == (version == "v1")
    queries = [
        large_objects(random_query(rng, random_support_set(rng), side=side))
        for side in (256, 240, 256)
    ]
    losses = model(queries)
    expected = {"loss_positive", "loss_negative"} | ({"loss_box"} if version == "v1" else set())
    assert set(losses) == expected
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    # Class by class over the whole batch: the order of queries says nothing.
    if version == "v2":
        again = model(queries[::-1])
        for name, loss in losses.items():
            assert_close(loss, again[name], atol=1e-5, rtol=1e-4)


class Counted(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_has_no_operators_that_sort_or_grow_with_queries(rng):
    """On CUDA ``index_put`` in backward passes sorts, and each launch and each question costs, whatever the size."""
    support = random_support_set(rng)
    made = {}
    for number in (2, 4):
        model = tiny().train()
        queries = [large_objects(random_query(rng, support, side=240)) for _ in range(number)]
        with Counted() as counted:
            sum(model(queries).values()).backward()
        made[number] = counted.calls
    assert (
        not made[4]["index_put"] and not made[4]["index_put_"] and not made[4]["_index_put_impl_"]
    )
    # Views among them.
    assert made[4].total() - made[2].total() < 2 * 160


def test_difficult_objects_are_no_target(rng):
    model = tiny().train()
    query = large_objects(random_query(rng, random_support_set(rng, ways=1), side=256))
    support, pairs = model.gather_supports([query])
    (plain,) = model._matched([query], support, pairs)
    assert (plain.targets.of_anchors == 1).any()
    query["instances"].gt_difficult = torch.tensor([True])
    (difficult,) = model._matched([query], support, pairs)
    assert not (difficult.targets.of_anchors == 1).any()
    assert torch.equal(difficult.targets.of_anchors == 0, plain.targets.of_anchors == 0)


def test_remapping_is_of_predicted_boxes_and_by_key(rng):
    query = large_objects(random_query(rng, random_support_set(rng, ways=1), side=256))
    labels = {}
    for remap in (True, False):
        model = tiny("v1", "MODEL.OS2D.REMAP_TARGETS", remap).train()
        support, pairs = model.gather_supports([query])
        (labels[remap],) = model._matched([query], support, pairs)
    assert torch.equal(labels[False].targets.labels, labels[False].targets.of_anchors)
    assert not torch.equal(labels[True].targets.labels, labels[True].targets.of_anchors)


def test_training_without_an_object_is_finite(rng):
    model = tiny().train()
    query = random_query(rng, random_support_set(rng))
    query["instances"] = query["instances"][[]]
    losses = model([query])
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()


def test_hard_patches_have_the_losses_of_their_places(rng):
    model = tiny("v1", "MODEL.OS2D.PATCH_SIZE", 128).train()
    query = large_objects(random_query(rng, random_support_set(rng), side=256))
    (patches,) = model.hard_patches([query])
    assert model.training
    count = len(patches["losses"])
    assert count and {len(t) for t in patches.values()} == {count}
    assert (patches["losses"] > 0).all() and set(patches["classes"].tolist()) <= {0, 1}
    corners = patches["boxes"][:, :2]
    assert (corners % 16 == 0).all() and corners.min() >= 0 and patches["boxes"].max() <= 256
    model.eval()
    with torch.no_grad():
        support, pairs = model.gather_supports([query])
        (found,) = model._matched([query], support, pairs)
        positive = found.targets.labels == 1
        losses = 0.5 * (0.6 - found.matches.scores[positive]).clamp(min=0)
    assert_close(patches["losses"][patches["kind"] == 1], losses[losses > 0])


def test_hard_patches_are_searched_a_chunk_at_a_time(rng, monkeypatch):
    queries = [
        large_objects(random_query(rng, random_support_set(rng, ways=5), side=side))
        for side in (240, 256)
    ]
    model = tiny("v1", "FEWSHOT.PAIRS_PER_CHUNK", 100)
    at_once = model.hard_patches(queries)
    model, sizes = tiny("v1", "FEWSHOT.PAIRS_PER_CHUNK", 2), []
    forward = model.matcher.forward
    monkeypatch.setattr(
        model.matcher, "forward", lambda i, f, c: sizes.append(sum(c)) or forward(i, f, c)
    )
    for some, every in zip(model.hard_patches(queries), at_once, strict=True):
        assert set(some["kind"].tolist()) == set(every["kind"].tolist()) >= {0, 2}
        rows = [
            torch.cat([p["boxes"], p["kind"][:, None], p["classes"][:, None]], dim=1).tolist()
            for p in (some, every)
        ]
        assert sorted(rows[0]) == sorted(rows[1])
        assert_close(some["losses"].sum(), every["losses"].sum(), atol=1e-4, rtol=1e-5)
    assert sizes == [2, 2, 1, 2, 2, 1]
    support = model.encode_support([queries[0]["support"]])[[]]
    (nothing,) = model.hard_patches([{**queries[0], "support": None, "support_features": support}])
    assert {len(tensor) for tensor in nothing.values()} == {0}


def test_patches_are_floored_to_cells_and_shifted_inside():
    anchors = geometry.anchors((20, 30), torch.device("cpu"))
    patches = patches_around(anchors, (320, 470), 100)
    expected = [
        min(max((x - 50) // 16 * 16, 0), limit) for x, limit in ((16 * 12.5, 368), (16 * 7.5, 208))
    ]
    assert patches[7 * 30 + 12].tolist() == [*expected, expected[0] + 100, expected[1] + 100]
    # As far inside as the grid of cells needs.
    assert patches[-1].tolist() == [368, 208, 468, 308]
    # A query smaller than the patch: its corner, and beyond its edges.
    assert patches_around(anchors[:1], (50, 60), 100).tolist() == [[0, 0, 100, 100]]


@torch.no_grad()
def test_thin_class_images_and_queries_smaller_than_a_cell(rng):
    for matcher in ("aligned", "window"):
        model = tiny("v1", "MODEL.OS2D.MATCHER", matcher)
        examples = [[random_support(rng, (1, 1000))], [random_support(rng, (1000, 1))]]
        support = SupportSet([1, 2], ["wide", "high"], examples)
        for side in (5, 16, 64):
            query = {**random_query(rng, random_support_set(rng, 1), side=64), "support": support}
            query["image"] = query["image"][:, :side, : side + 1]
            found = model([query])[0]["instances"]
            assert len(found) and torch.isfinite(found.scores).all()
            assert found.pred_boxes.nonempty().all()


@torch.no_grad()
def test_half_precision_is_near_full_precision(rng):
    """bfloat16 on a CPU, on a map that full precision would take to the frequency domain."""
    for version in ("v1", "v2"):
        model = tiny(version)
        query = random_query(rng, random_support_set(rng), side=224)
        (full,) = model.score_maps(query, model.encode_support([query["support"]]))
        with torch.autocast("cpu", torch.bfloat16):
            (half,) = model.score_maps(query, model.encode_support([query["support"]]))
            found = model([query])[0]["instances"]
        assert half.dtype == found.pred_boxes.tensor.dtype == torch.float32
        assert 0 < (half - full).abs().max() < 5e-3
        assert torch.isfinite(found.pred_boxes.tensor).all()


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@torch.no_grad()
def test_explanation_is_of_the_first_class_with_all_its_shots(rng, order):
    """The best of all levels is the score of that class's best detection, which NMS leaves."""
    model = tiny("v1", "MODEL.OS2D.PYRAMID", (0.5, 1.0))
    support = random_support_set(rng, ways=2, shots=2)
    features = model.encode_support([support])[order]
    query = random_query(rng, support)
    found = model.search(query, features)
    of_first = found.scores[found.pred_classes == 0]
    shown = model.explain(model.describe_queries([query])[0], features)
    assert list(shown) == ["score, level 0.5", "score, level 1"]
    assert_close(max(m.max() for m in shown.values()), of_first.max(), atol=1e-6, rtol=0)
    for size, scores in zip(((32, 32), (64, 64)), shown.values(), strict=True):
        maps = unit_maps(model.backbone(model._resized(query["image"], size)[None])["res4"])
        shots = [
            model.matcher({"cells": features.tensors["cells"][0, s][None]}, maps, [1]).scores
            for s in range(2)
        ]
        wanted = torch.cat(shots).amax(dim=0).view(maps.shape[2:])
        assert_close(scores, wanted, atol=1e-6, rtol=0)


@torch.no_grad()
def test_turned_examples_are_turned_class_images(rng):
    """The original turns the resized, normalised class image; here the example is turned, then resized."""
    model = tiny("v1", "MODEL.OS2D.CLASS_SIZE", 240)
    turn = SupportAugmentation(rotations=(90, 180, 270), mirror=True)
    for shape in ((50, 70), (335, 150), (1, 9)):
        shot = random_support(rng, shape)
        upright, mirror, *rest = [s.image for s in turn.shots([shot])]
        resized = model._resized(upright, model._class_size(shape))
        turned = [resized.rot90(quarter, (1, 2)) for quarter in (1, 2, 3)]
        expected = [resized.flip(2), *turned]
        for image, wanted in zip([mirror, *rest[::2]], expected, strict=True):
            found = model._resized(image, model._class_size(tuple(image.shape[1:])))
            # A grey level, where rounding falls otherwise.
            assert_close(found, wanted, atol=1.01 / 57.0, rtol=0)


def test_sizes_of_class_images_are_rounded_in_training_alone(rng):
    model = tiny("v1", "MODEL.OS2D.TRAIN_CLASS_STEP", 32, "MODEL.OS2D.CLASS_SIZE", 240)
    assert model.train()._class_size((150, 335)) == (160, 352)
    assert model.eval()._class_size((150, 335)) == (160, 358)
    assert tiny("v1", "MODEL.OS2D.CLASS_SIZE", 240).train()._class_size((150, 335)) == (160, 358)


@torch.no_grad()
def test_no_class_at_all(rng):
    model = tiny()
    with pytest.raises(ValueError, match="at least one class"):
        SupportSet([], [], [])
    features = model.encode_support([random_support_set(rng)])
    query = random_query(rng, random_support_set(rng))
    del query["support"]
    assert not len(model([{**query, "support_features": features[[]]}])[0]["instances"])


def thousand_classes(model, rng):
    """One class a thousand times."""
    one = model.encode_support([random_support_set(rng, ways=1)])
    tensors = {name: t.repeat(1000, *[1] * (t.dim() - 1)) for name, t in one.tensors.items()}
    return SupportFeatures(tensors, list(range(1000)), system="OS2D")


@torch.no_grad()
def test_a_thousand_classes_are_matched_and_merged_in_chunks(rng, monkeypatch):
    """Of the maps of places and of boxes there are never more than those of a chunk and a class."""
    model = tiny("v1", "FEWSHOT.PAIRS_PER_CHUNK", 16)
    many = thousand_classes(model, rng)
    sizes, merged, forward, survivors = [], [], model.matcher.forward, Merging.survivors
    monkeypatch.setattr(
        model.matcher, "forward", lambda i, f, c: sizes.append(len(i["cells"])) or forward(i, f, c)
    )
    monkeypatch.setattr(
        Merging, "survivors", lambda self, c: merged.append(len(c.scores)) or survivors(self, c)
    )
    query = random_query(rng, random_support_set(rng), side=32)
    del query["support"]
    found = model([{**query, "support_features": many}])[0]["instances"]
    assert max(sizes) == 16 and sum(sizes) == 1000
    assert max(merged) <= (16 + 1) * 2 * 2 and sum(merged) == 1000 * 2 * 2
    assert found.pred_classes.unique().tolist() == list(range(1000))


def measured_growth():
    """Megabytes that 1,000 classes cost at their most on top of a single chunk; for a process of its own."""

    def most():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    model = tiny("v1", "FEWSHOT.PAIRS_PER_CHUNK", 16)
    query = random_query(rng, random_support_set(rng), side=96)
    del query["support"]
    with torch.no_grad():
        many = thousand_classes(model, rng)
        model([{**query, "support_features": many[range(16)]}])
        before = most()
        model([{**query, "support_features": many}])
    return most() - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_of_a_thousand_classes_is_that_of_a_chunk():
    """All at once, the correlation alone would have 32 MB and the sampled places 70."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        growth = pool.submit(measured_growth).result(timeout=120)
    assert growth < 25


@pytest.mark.parametrize(
    ("key", "value"),
    [("MATCHER", "other"), ("TRANSFORM", "tps"), ("FEATURE", "res3"), ("LOSS", "triplet")],
)
def test_unknown_choices_are_refused(key, value):
    with pytest.raises(ValueError, match=f"MODEL.OS2D.{key}"):
        tiny("v1", f"MODEL.OS2D.{key}", value)


def original_name(name):
    """Our name of a weight as the release has it; written from its layout."""
    if name.startswith("matcher.transform_net."):
        return "os2d_head_creator.aligner.parameter_regressor." + name.split(".", 2)[2]
    parts = name.split(".")[1:]
    if parts[0] == "stem":
        rest = ["bn1", parts[3]] if parts[2] == "norm" else ["conv1", parts[2]]
    else:
        rest = [f"layer{int(parts[0][3]) - 1}", parts[1]]
        if parts[2] == "shortcut":
            rest += (
                ["downsample", "1", parts[4]]
                if parts[3] == "norm"
                else ["downsample", "0", parts[3]]
            )
        else:
            number = parts[2][-1]
            rest += [f"bn{number}", parts[4]] if parts[3] == "norm" else [f"conv{number}", parts[3]]
    return ".".join(["net_feature_maps", *rest])


def original_state(model):
    """A state dict of the release: the extractor is in it twice."""
    state = {}
    for name, tensor in model.state_dict().items():
        new = original_name(name)
        state[new] = tensor
        if new.startswith("net_feature_maps."):
            state[new.replace("net_feature_maps", "net_label_features.net_class_features")] = tensor
    return state


@pytest.mark.parametrize("version", ["v1", "v2"])
@torch.no_grad()
def test_release_gives_the_same_scores_boxes_and_corners(rng, version, tmp_path):
    model, other = tiny(version), tiny(version, seed=1)
    state = original_state(model)
    assert len(state) == 532
    torch.save({"net": state, "optimizer": {}}, tmp_path / "release.pth")
    assert convert_file(tmp_path / "release.pth", tmp_path / "ours.pth") == 274
    query = random_query(rng, random_support_set(rng))
    expected, before = model([query])[0]["instances"], other([query])[0]["instances"]
    assert not torch.equal(expected.scores[:5], before.scores[:5])
    FewShotCheckpointer(other).load(str(tmp_path / "ours.pth"))
    found = other([query])[0]["instances"]
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.pred_corners, expected.pred_corners)


def test_weakalign_gives_extractor_and_transformation():
    model = tiny("v2")
    parts = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6"}
    state = {}
    for name, tensor in original_state(model).items():
        if name.startswith("net_feature_maps."):
            _, part, rest = name.split(".", 2)
            state[f"FeatureExtraction.model.{parts[part]}.{rest}"] = tensor
        elif name.startswith("os2d_head_creator."):
            state["FeatureRegression." + name.split("parameter_regressor.")[1]] = tensor
    state["FeatureRegression.linear.weight"] = state["FeatureRegression.linear.weight"].flatten(1)
    converted = convert(state)
    own = model.state_dict()
    assert set(converted) == set(own)
    assert all(torch.equal(tensor, own[name]) for name, tensor in converted.items())


@pytest.mark.parametrize("change", ["unknown", "differ", "missing", "broken"])
def test_other_files_are_refused(change, tmp_path):
    state = original_state(tiny())
    if change == "unknown":
        state["head.weight"] = torch.zeros(1)
    elif change == "differ":
        state["net_feature_maps.conv1.weight"] = torch.zeros(1)
    elif change == "missing":
        state = {name: t for name, t in state.items() if not name.startswith("os2d_head")}
    content = [1, 2] if change == "broken" else state
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth"):
        convert_file(tmp_path / "x.pth", tmp_path / "y.pth")
    assert not (tmp_path / "y.pth").exists()


@pytest.mark.parametrize("name", ["R_50_grozi_v1", "R_50_grozi_v2", "flickrlogos27_v1"])
def test_configs_have_the_schedule_and_the_augmentation_of_the_original(name):
    cfg = load_config(str(CONFIGS / f"{name}.yaml"), ["MODEL.DEVICE", "cpu"])
    assert cfg.FEWSHOT.MAPPER == "PatchMapper"
    assert cfg.SOLVER.MOMENTUM == 0.9 and cfg.SOLVER.WEIGHT_DECAY_NORM == cfg.SOLVER.WEIGHT_DECAY
    assert cfg.FEWSHOT.NUM_WAYS + cfg.FEWSHOT.NUM_ABSENT_WAYS <= 15
    if name.startswith("R_50"):
        solver = cfg.SOLVER
        assert cfg.INPUT.RANDOM_FLIP == "none"
        assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.CLIP_GLOBAL_NORM) == (1e-4, 1e-4, 100)
        assert (solver.STEPS, solver.MAX_ITER) == ((100000, 150000), 200000)
        assert (solver.IMS_PER_BATCH, solver.WARMUP_ITERS) == (4, 0)
        assert cfg.MODEL.BACKBONE.FREEZE_AT == 0 and not cfg.MODEL.RESNETS.STRIDE_IN_1X1
        assert (5000 if name.endswith("v2") else 0) == cfg.FEWSHOT.MINING.PERIOD
        assert (0.0 if name.endswith("v2") else 0.2) == cfg.MODEL.OS2D.LOCALIZATION_WEIGHT


def test_release_of_the_paper_has_the_published_number_of_weights():
    for version, number in (("v1", 10166276), ("v2", 10169478)):
        cfg = load_config(str(CONFIGS / f"R_50_grozi_{version}.yaml"), ["MODEL.DEVICE", "cpu"])
        assert sum(p.numel() for p in build_model(cfg).parameters()) == number


@torch.no_grad()
def test_score_maps_are_those_of_the_boxes(rng):
    model = tiny("v1", "MODEL.OS2D.PYRAMID", (1.0, 1.5))
    support = random_support_set(rng, ways=3)
    query = random_query(rng, support)
    maps = model.score_maps(query, model.encode_support([support]))
    assert [tuple(m.shape) for m in maps] == [(3, 4, 4), (3, 6, 6)]
    best = model([query])[0]["instances"].scores[0]
    assert_close(torch.stack([m.max() for m in maps]).max(), best, atol=1e-6, rtol=0)


def test_supports_in_the_channel_order_of_queries(rng):
    support = random_support_set(rng, ways=1)
    swapped = dataclasses.replace(
        support, examples=[[Support(support.examples[0][0].image.flip(0))]]
    )
    with torch.no_grad():
        rgb = tiny().encode_support([support]).tensors["cells"]
        bgr = tiny("v1", "INPUT.FORMAT", "BGR").encode_support([swapped]).tensors["cells"]
    assert torch.equal(rgb, bgr)
