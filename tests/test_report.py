"""The report: complete, self-contained, and honest about failures; the pictures in it."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from evaluation_cases import (
    CLASS_NAMES,
    HEIGHT,
    WIDTH,
    plan_of,
    random_detections,
    random_dicts,
    truth_of,
)
from PIL import Image

from fewshot_d2.evaluation import (
    EvaluatedRun,
    ReportFacts,
    ReportRow,
    evaluate_detections,
    gt_shift,
    write_report,
)
from fewshot_d2.evaluation.assignment import assign_pairs
from fewshot_d2.evaluation.report_figures import read_losses
from fewshot_d2.evaluation.report_gallery import GROUPS, choose_pairs, draw_pairs
from fewshot_d2.structures import Support, SupportSet
from fewshot_d2.visualization import (
    draw_instances,
    episode_panel,
    plot_by_number,
    plot_confusion,
    plot_precision_recall,
    query_panel,
)
from fewshot_d2.visualization.canvas import CLASS_COLORS
from fewshot_d2.visualization.pictures import RIGHT, TRUTH, WRONG


@pytest.fixture
def dataset(tmp_path):
    """A registered data set with pictures; gives (name, dicts)."""
    rng = np.random.default_rng(0)
    dicts = random_dicts(rng, num_images=16, crowd=0.1, file_name=str(tmp_path / "{}.png"))
    for record in dicts:
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(record["file_name"])
    name = "report_pictures"
    DatasetCatalog.register(name, lambda: dicts)
    MetadataCatalog.get(name).set(
        thing_classes=list(CLASS_NAMES.values()),
        thing_dataset_id_to_contiguous_id={c: i for i, c in enumerate(CLASS_NAMES)},
    )
    yield name, dicts
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def rows_of(name, dicts, protocol="open", masks=True):
    truth = truth_of(dicts)
    novel, baseline = [], []
    for run in range(2):
        plan = plan_of(dicts, protocol=protocol, dataset=name, run=run, seed=41)
        found = random_detections(np.random.default_rng(run), dicts, masks=masks)
        shifted = gt_shift(truth, plan, np.random.default_rng(run))
        for runs, detections in ((novel, found), (baseline, shifted)):
            results = evaluate_detections(truth, detections, plan)
            runs.append(EvaluatedRun(plan, results, detections))
    return [ReportRow("novel <classes>", novel), ReportRow("shifted", baseline, is_baseline=True)]


class Balanced(HTMLParser):
    """Fails on a tag that is closed in the wrong place; collects addresses."""

    def __init__(self):
        super().__init__()
        self.open_tags, self.addresses, self.headings, self.scripts = [], [], [], 0

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open_tags.append(tag)
        self.scripts += tag == "script"
        self.addresses += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if self.open_tags and self.open_tags[-1] == "h2":
            self.headings.append(data)


def test_report_is_complete_and_self_contained(dataset, tmp_path):
    rows = rows_of(*dataset)
    metrics = tmp_path / "metrics.json"
    metrics.write_text(
        '{"iteration": 19, "total_loss": 2.0, "loss_cls": 1.0}\n{"iteration": 39, "tot'
    )
    facts = ReportFacts(
        command="train_net.py --eval-only <x>",
        config="MODEL:\n  DEVICE: cpu\n",
        seeds={"plans": 41},
        elapsed={"training": 75.0},
        metrics_file=metrics,
        notes="weights: none",
    )
    path = tmp_path / "out" / "report.html"
    write_report(path, rows, facts, title="Title & <more>", gallery_size=2)
    text = path.read_text(encoding="utf-8")
    for row in rows:
        assert all(run.plan.sha256 in text for run in row.runs)
    page = Balanced()
    page.feed(text)
    assert page.open_tags == [] and page.scripts == 0
    assert all(address.startswith("data:image/") for address in page.addresses)
    # 3 groups of 2 panels, 2 tasks of 2 diagrams, confusion, losses.
    assert len(page.addresses) == 6 + 4 + 2
    assert "http" not in re.sub(r"base64,[^\"]*", "", text) and "@import" not in text
    wanted = ["Summary", "Plans", "Pictures: novel <classes>", "Precision and recall", "Clutter"]
    wanted += ["Confusion: novel <classes>", "Classes", "Training", "How it was measured"]
    assert page.headings == wanted
    for fact in ("Title &amp; &lt;more&gt;", "--eval-only &lt;x&gt;", "DEVICE: cpu", "1 min 15 s"):
        assert fact in text
    for word in ("detectron2", "torchvision", "torch threads", "weights: none", "Best", "Worst"):
        assert word in text
    assert "AUROC" in text
    mean = np.mean([run.results["bbox"]["AP50"] for run in rows[0].runs])
    assert f"{mean:.1f} ± " in text
    assert len(text) < 10e6
    encoded = next(a for a in page.addresses if a.startswith("data:image/jpeg"))
    content = base64.b64decode(encoded.partition(",")[2])
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.width >= 384 and picture.height > 2 * 384


def test_the_first_pair_of_each_group_is_explained(dataset, tmp_path):
    rows = rows_of(*dataset)
    asked = []

    def explain(image_id, class_id):
        asked.append((image_id, class_id))
        if len(asked) == 2:
            return {}
        return {"_heat": np.zeros((8, 8, 3), np.uint8), "_grid": np.zeros((8, 8, 3), np.uint8)}

    runs = [dataclasses.replace(run, explain=explain) for run in rows[0].runs]
    path = tmp_path / "report.html"
    write_report(path, [dataclasses.replace(rows[0], runs=runs), rows[1]], gallery_size=2)
    assert len(set(asked)) == 3
    text = path.read_text()
    captions = re.findall(r">(\w+), image (\d+): (heat|grid)<", text)
    assert captions == [
        (CLASS_NAMES[c], str(i), kind) for i, c in (asked[0], asked[2]) for kind in ("heat", "grid")
    ]
    # Three groups of two pairs, and two panels of two pairs.
    assert text.count("data:image/jpeg") == 6 + 4


def test_report_without_masks_training_or_runs(dataset, tmp_path):
    rows = rows_of(*dataset, protocol="present", masks=False)[:1]
    facts = ReportFacts(metrics_file=tmp_path / "metrics.json")
    write_report(tmp_path / "report.html", rows, facts, gallery_size=0)
    text = (tmp_path / "report.html").read_text()
    for absent in ("mask AP50", "<h2>Training</h2>", "AUROC", "IoU", "Pictures", "image/jpeg"):
        assert absent not in text
    with pytest.raises(ValueError, match="at least one run"):
        ReportRow("empty", [])


def test_single_target_scores_are_in_the_summary(dataset, tmp_path):
    rows = rows_of(*dataset, protocol="present", masks=False)[:1]
    for run in rows[0].runs:
        run.results["localization"] = {"mask_iou": 61.4, "localization_accuracy": 83.0}
    write_report(tmp_path / "report.html", rows, ReportFacts(), gallery_size=0)
    text = (tmp_path / "report.html").read_text()
    assert "IoU of the best" in text and "61.4" in text and "83.0" in text


def test_pictures_that_cannot_be_read_are_left_out(dataset, caplog):
    name, dicts = dataset
    rows = rows_of(name, dicts)
    run, truth = rows[0].runs[0], truth_of(dicts)
    assignments = assign_pairs(truth, run.detections, run.plan)
    # No support is in the last image.
    pairs = [(16, 3), (5, 3)]
    with open(truth.images[16]["file_name"], "wb") as file:
        file.write(b"not a picture")
    arguments = (run.plan, truth, truth, run.detections, assignments)
    pictures = draw_pairs(pairs, *arguments, threshold=0.3)
    assert len(pictures) == 1 and "image 5" in pictures[0].caption
    assert "No picture" in caplog.text


def test_chosen_pairs_show_success_and_failure(dataset):
    name, dicts = dataset
    run, truth = rows_of(name, dicts)[0].runs[0], truth_of(dicts)
    assignments = assign_pairs(truth, run.detections, run.plan)
    groups = choose_pairs(assignments, 0.4, 3)
    chosen = [pair for group in GROUPS for pair in groups[group]]
    assert len(chosen) == 9 == len({image_id for image_id, _ in chosen})
    f1 = {group: [assignments[p].f1(0.4) for p in groups[group]] for group in GROUPS}
    assert min(f1["best"]) >= max(f1["median"]) >= min(f1["median"]) >= max(f1["worst"])
    everything = sorted((a.f1(0.4) for a in assignments.values() if a.num_instances), reverse=True)
    assert f1["best"][0] == everything[0] and f1["worst"][0] == 0
    # Searches that rightly found nothing tell a reader nothing.
    assert all(assignments[p].num_instances or assignments[p].counts(0.4)[1] for p in chosen)
    assert choose_pairs({}, 0.5, 3) == {"best": [], "median": [], "worst": []}


def test_losses_of_a_training_run(tmp_path):
    # Killed after iteration 60 and resumed from 40.
    lines = [
        {"iteration": i, "total_loss": i / 2, "loss_a": 1.0, "lr": 0.1} for i in (40, 60, 20, 40)
    ]
    lines[0]["loss_a"] = 7.0
    path = tmp_path / "metrics.json"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"iterat')
    assert read_losses(path) == {
        "total_loss": ([20, 40, 60], [10.0, 20.0, 30.0]),
        "loss_a": ([20, 40, 60], [1.0, 1.0, 1.0]),
    }


def instances_of(boxes, masks=False, scores=None, size=(100, 100)):
    instances = Instances(size)
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    kind = "gt" if scores is None else "pred"
    instances.set(f"{kind}_boxes", Boxes(boxes))
    instances.set(f"{kind}_classes", torch.arange(len(boxes)) % 2)
    if scores is not None:
        instances.scores = torch.tensor(scores)
    if masks:
        shapes = torch.zeros(len(boxes), *size, dtype=torch.bool)
        for shape, (x0, y0, x1, y1) in zip(shapes, boxes.int().tolist(), strict=True):
            shape[y0:y1, x0:x1] = True
        instances.set(f"{kind}_masks", shapes if kind == "pred" else BitMasks(shapes))
    return instances


def count(picture, color):
    return int((picture == np.array(color)).all(axis=-1).sum())


def test_small_pictures_are_enlarged_and_boxes_are_where_they_belong():
    image = np.zeros((96, 128, 3), np.uint8)
    before = image.copy()
    picture = draw_instances(image, instances_of([[32, 24, 64, 48]], size=(96, 128)))
    assert picture.shape == (384, 512, 3) and (image == before).all()
    rows, columns = np.nonzero((picture == np.array(CLASS_COLORS[0])).all(axis=-1))
    assert columns.min() == 4 * 32 - 2 and rows.max() == 4 * 48 + 2
    assert draw_instances(np.zeros((500, 800, 3), np.uint8), instances_of([])).shape == (
        500,
        800,
        3,
    )
    assert max(draw_instances(np.zeros((40, 4000, 3), np.uint8), instances_of([])).shape) == 1024


def test_detections_below_the_threshold_are_not_drawn():
    image = np.zeros((400, 400, 3), np.uint8)
    two = instances_of([[10, 10, 90, 90], [200, 200, 300, 300]], scores=[0.9, 0.2], size=(400, 400))
    assert count(draw_instances(image, two), CLASS_COLORS[1])
    assert not count(draw_instances(image, two, threshold=0.5), CLASS_COLORS[1])
    named = draw_instances(image, two, ["cat", "dog"], threshold=0.5)
    assert count(named, CLASS_COLORS[0]) > count(
        draw_instances(image, two, threshold=0.5), CLASS_COLORS[0]
    )


@pytest.mark.parametrize("masks", [False, True])
def test_panel_shows_verdicts_and_supports(masks):
    # No grey, which letters have.
    image = np.full((400, 400, 3), (60, 70, 60), np.uint8)
    shot = torch.zeros(3, 40, 40, dtype=torch.uint8)
    shot[2] = 255
    support = SupportSet([9], ["dog"], [[Support(shot, torch.tensor([5.0, 5.0, 25.0, 35.0]))]])
    truth = instances_of([[20, 20, 90, 90], [300, 300, 380, 380]], masks, size=(400, 400))
    found = instances_of(
        [[20, 20, 90, 90], [200, 100, 260, 160]], masks, scores=[0.9, 0.6], size=(400, 400)
    )
    panel = episode_panel(
        image,
        support,
        ground_truth=truth,
        predictions=found,
        correct=[True, False],
        found=[True, False],
    )
    assert panel.shape[1] == 400 and panel.shape[0] > 800 and panel.dtype == np.uint8
    assert all(count(panel, color) for color in (TRUTH, RIGHT, WRONG))
    # The thumbnail has the example's colour and stands above the picture.
    thumbnail, picture = (
        np.nonzero((panel == np.array(color)).all(axis=-1))[0]
        for color in ((0, 0, 255), (60, 70, 60))
    )
    assert len(thumbnail) and thumbnail.max() < picture.min()
    right_only = episode_panel(
        image,
        support,
        ground_truth=truth,
        predictions=found,
        threshold=0.7,
        correct=[True, False],
        found=[1, 0],
    )
    assert count(right_only, RIGHT) and not count(right_only, WRONG)


def test_panel_of_several_classes_without_truth_or_detections():
    image = np.zeros((100, 100, 3), np.uint8)
    shot = Support(torch.zeros(3, 8, 8, dtype=torch.uint8))
    support = SupportSet([1, 2], ["a", "b"], [[shot, shot], [shot]])
    assert episode_panel(image, support).shape[1] == 384
    both = instances_of([[5, 5, 30, 30], [50, 50, 80, 80]], masks=True)
    panel = episode_panel(image, support, ground_truth=both)
    assert count(panel, CLASS_COLORS[0]) and count(panel, CLASS_COLORS[1])
    empty = episode_panel(
        image, support, ground_truth=instances_of([]), predictions=instances_of([], scores=[])
    )
    assert empty.shape[0] > 2 * 384
    polygons = instances_of([[5, 5, 30, 30]])
    polygons.gt_masks = PolygonMasks([[np.array([5.0, 5, 30, 5, 30, 30, 5, 30])]])
    as_mask = instances_of([[5, 5, 30, 30]], masks=True)
    assert (draw_instances(image, polygons) == draw_instances(image, as_mask)).all()


def test_query_panel_scales_detections_to_the_resized_query():
    shot = Support(torch.zeros(3, 8, 8, dtype=torch.uint8))
    query = {
        "image": torch.zeros(3, 400, 800, dtype=torch.uint8),
        "support": SupportSet([1, 2], ["a", "b"], [[shot], [shot]]),
    }
    query["image"][0] = 200
    found = instances_of([[10, 20, 50, 60]], masks=True, scores=[0.9], size=(100, 200))
    panel = query_panel(query, found, "BGR")
    boxes = found.pred_boxes.tensor.clone()
    tile = panel[-400:]
    assert tile[5, 5].tolist() == [0, 0, 200]
    rows, columns = np.nonzero((tile == np.array(CLASS_COLORS[0])).all(axis=-1))
    assert (columns.min(), rows.max()) == (4 * 10 - 3, 4 * 60 + 2)
    assert (found.pred_boxes.tensor == boxes).all()
    query["instances"] = instances_of([[40, 80, 200, 240]], masks=True, size=(400, 800))
    with_truth = query_panel(query, found, "RGB", threshold=0.95)
    assert count(with_truth[:430], CLASS_COLORS[0]) and not count(with_truth[430:], CLASS_COLORS[0])


def test_plots_are_pictures_also_of_nothing():
    undefined = np.array([[50.0, np.nan], [0.0, 10.0]])
    for content in (
        plot_precision_recall({"novel": np.linspace(1, 0, 101)}),
        plot_precision_recall({}),
        plot_by_number({}, "number", "value"),
        plot_by_number({"a": {n: (1.0, float("nan")) for n in range(0, 2700, 100)}}, "x", "y"),
        plot_confusion(undefined, ["a", "b"]),
        plot_confusion(np.full((30, 30), np.nan), [str(i) for i in range(30)]),
    ):
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.format == "PNG" and min(picture.size) > 300


def test_a_report_of_no_detections(dataset, tmp_path):
    name, dicts = dataset
    plan = plan_of(dicts, dataset=name)
    results = evaluate_detections(truth_of(dicts), [], plan)
    row = ReportRow("novel", [EvaluatedRun(plan, results, [])])
    write_report(tmp_path / "report.html", [row], gallery_size=1)
    assert plan.sha256 in (tmp_path / "report.html").read_text()
