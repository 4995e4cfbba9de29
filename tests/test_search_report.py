"""Instance search measured against annotations: by hand, whatever the names and the order; broken runs by name."""

import csv
import dataclasses
import hashlib
import importlib.util
import io
import json
import math

import pytest
import torch
from factories import ROOT, TINY_SPIL, TINY_SPIL_OVERRIDES, registered_set
from PIL import Image
from search_cases import FAR, search_lists, stage_labels, write_search_set
from test_report import Balanced

from fewshot_d2 import load_config
from fewshot_d2.data.loaders import build_index
from fewshot_d2.data.rank_lists import RankLists
from fewshot_d2.engine import reranking
from fewshot_d2.engine.region_search import describe_boxes
from fewshot_d2.engine.reranking import Reranker, build_describe
from fewshot_d2.engine.search_report import evaluate_search
from fewshot_d2.evaluation.coco_scoring import GroundTruth
from fewshot_d2.evaluation.search_pictures import PictureReader, choose_queries
from fewshot_d2.evaluation.search_runs import SearchTruth

# The search's numbers, in percent.
SEARCH_MAP = 100 * (5 / 9 + 1 / 2) / 2


@pytest.fixture
def folder(tmp_path):
    """The set under two names, its rank lists, and a run with two stages."""
    write_search_set(tmp_path)
    lists = search_lists()
    lists.save(tmp_path / "lists.json")
    write_run(tmp_path / "run", lists)
    with registered_set("searched", tmp_path), registered_set("queries", tmp_path):
        yield tmp_path


def write_run(path, lists, stages=(0, 1)):
    for number in stages:
        stage_labels(lists, number).save(path / f"stage_{number + 1}.json")
    return path


def config(folder, *overrides):
    keys = ["FEWSHOT.SELF_PACED.RANK_LISTS", str(folder / "lists.json")]
    keys += ["OUTPUT_DIR", str(folder / "out"), *overrides]
    return load_config(str(TINY_SPIL), [*TINY_SPIL_OVERRIDES, *keys])


def measured(folder, runs=None, describe=None, *overrides, **options):
    runs = {"run": folder / "run"} if runs is None else runs
    return evaluate_search(config(folder, *overrides), runs, describe, **options)


def test_hand_worked_numbers(folder):
    results = measured(folder)
    assert list(results["rows"]) == ["search", "run: stage 0", "run: stage 1"]
    search, first, second = results["rows"].values()
    # IoU [1, false, .5] and [false, .5]; the own image and the crowd's are left out.
    assert search["num_own_or_crowd_left_out"] == 2
    assert search["mIoU"] == pytest.approx(100 * (0.75 + 0.5) / 2)
    assert search["mIoU_all"] == pytest.approx(100 * (0.5 + 0.25) / 2)
    assert (search["recall_iou50"], search["recall_iou75"]) == pytest.approx((100, 25))
    # True images are 101, 102 and 105 for one, 107 for the other: their own images do not count.
    assert search["mAP"] == pytest.approx(SEARCH_MAP)
    # IoU [0, 1] and [1].
    assert first["mIoU"] == pytest.approx(75) and first["recall_iou75"] == pytest.approx(75)
    assert second["mIoU"] == 100 and second["mIoU_ci95"] == 0
    assert first["mAP"] == second["mAP"] == pytest.approx(SEARCH_MAP)
    # Differences -.25 and .5: mean .125, s = .75 / sqrt(2), over sqrt(2) queries.
    difference = first["difference"]["search"]
    assert difference["mIoU"] == pytest.approx(12.5)
    assert difference["mIoU_ci95"] == pytest.approx(1.96 * 37.5)
    assert difference["mAP"] == difference["mAP_ci95"] == 0


def test_counts_of_stages(folder):
    first, second = list(measured(folder)["rows"].values())[1:]
    # Above .5: .9 in a false image and .8; then .95, .7 in its own, .6 and .9 in an empty image.
    assert (first["num_confident"], second["num_confident"]) == (2, 4)
    assert (first["num_confident_true"], second["num_confident_true"]) == (1, 2)
    assert (first["num_confident_iou50"], second["num_confident_iou50"]) == (1, 2)
    assert (first["num_without_box"], second["num_without_box"]) == (3, 1)
    assert first["num_candidates"] == 7 and first["threshold"] == 0.5
    content = (folder / "run" / "stage_2.json").read_bytes()
    assert second["sha256"] == hashlib.sha256(content).hexdigest()


def without_files(results):
    """What does not depend on where things are and what they are called."""
    skipped = ("file", "sha256", "run", "difference")
    return [{k: v for k, v in row.items() if k not in skipped} for row in results["rows"].values()]


def test_name_of_the_queries_set_does_not_matter(folder):
    expected = without_files(measured(folder))
    lists = search_lists(query_dataset="queries")
    lists.save(folder / "lists.json")
    write_run(folder / "run", lists)
    assert without_files(measured(folder)) == expected


def test_image_of_the_same_id_but_another_file_counts(folder):
    """The queries' image 100 is another picture than the one with that id in the set that is searched."""
    other = folder / "other"
    other.mkdir()
    write_search_set(other)
    lists = search_lists(query_dataset="elsewhere")
    lists.save(folder / "lists.json")
    with registered_set("elsewhere", other):
        search = measured(folder, {})["rows"]["search"]
    # 100 at the third place is true now, and 103 is the fourth true image of its class.
    first = (1 + 2 / 3 + 3 / 4) / 4
    assert search["num_own_or_crowd_left_out"] == 1
    assert search["mAP"] == pytest.approx(100 * (first + 1 / 4) / 2)


def test_order_of_queries_does_not_matter(folder):
    expected = measured(folder, {})["rows"]["search"]
    lists = search_lists()
    dataclasses.replace(lists, lists=lists.lists[::-1]).save(folder / "lists.json")
    found = measured(folder, {})["rows"]["search"]
    assert found.pop("difference") == expected.pop("difference") == {}
    numbers = {k: v for k, v in expected.items() if not isinstance(v, str)}
    assert {k: found[k] for k in numbers} == pytest.approx(numbers)


def test_depth_cuts_lists(folder):
    search = measured(folder, {}, None, "FEWSHOT.RETRIEVAL.DEPTH", 1)["rows"]["search"]
    assert (search["mIoU"], search["num_queries_found"]) == (100, 1)
    assert search["mAP"] == pytest.approx(100 / 3 / 2)


def test_several_runs_are_compared_with_the_first(folder):
    write_run(folder / "better", search_lists())
    content = (folder / "better" / "stage_2.json").read_text()
    (folder / "better" / "stage_1.json").write_text(content.replace('"stage": 2', '"stage": 1'))
    runs = {"SP": folder / "run", "SP+CT": folder / "better"}
    rows = measured(folder, runs)["rows"]
    assert list(rows)[1:] == ["SP: stage 0", "SP: stage 1", "SP+CT: stage 0", "SP+CT: stage 1"]
    assert rows["SP+CT: stage 0"]["difference"]["SP: stage 0"]["mIoU"] == pytest.approx(25)
    assert rows["SP+CT: stage 1"]["difference"]["SP: stage 1"]["mIoU"] == 0
    assert list(rows["SP: stage 0"]["difference"]) == ["search"]
    names = {path.name for path in (folder / "out").iterdir()}
    assert {"recall_iou.png", "recall_iou_SP.png", "recall_iou_SP+CT.png"} <= names


def cosines(values):
    """Describes boxes by {(image id, box): cosine with every query}; queries are at (0, 0, 10, 10) of 100 and 103."""

    def describe(dataset, boxes):
        return {
            image_id: torch.tensor(
                [
                    [c, math.sqrt(1 - c * c)]
                    for c in (values.get((image_id, tuple(box)), 1.0) for box in of_image.tolist())
                ]
            )
            for image_id, of_image in boxes.items()
            if values.get(image_id) != "unread"
        }

    return describe


def test_hand_worked_reranking(folder):
    """By stage 1's boxes 102 comes before 103, which comes before 101; the second list is turned round."""
    exact, whole = (0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 20.0, 10.0)
    values = {(101, exact): 0.1, (103, FAR): 0.5, (102, exact): 0.9}
    values |= {(106, FAR): 0.2, (107, whole): 0.6, (107, exact): 0.1}
    # The search's own boxes order the lists as the search has done, but for 102.
    values |= {(102, (0.0, 0.0, 10.0, 5.0)): 0.3}
    rows = measured(folder, None, cosines(values))["rows"]
    row, control = rows["run: re-ranked"], rows["search, re-ranked"]
    assert row["boxes_of"] == "stage 1" and row["num_images_unread"] == 0
    assert row["mAP"] == pytest.approx(100 * ((1 + 2 / 3) / 3 + 1) / 2)
    # 103, 102, 101 and 106, 107.
    assert control["mAP"] == pytest.approx(100 * ((1 / 2 + 2 / 3) / 3 + 1 / 2) / 2)
    # Boxes go with their candidates.
    assert row["mIoU"] == rows["run: stage 1"]["mIoU"] == 100
    assert control["mIoU"] == pytest.approx(62.5)
    assert row["difference"]["search"]["mAP"] == pytest.approx(25)
    assert row["difference"]["search, re-ranked"]["mAP"] == pytest.approx(
        row["mAP"] - control["mAP"]
    )


def test_unread_images_are_counted_and_come_last(folder):
    exact = (0.0, 0.0, 10.0, 10.0)
    describe = cosines({101: "unread", (103, FAR): -0.9, (102, exact): 0.9})
    row = measured(folder, None, describe)["rows"]["run: re-ranked"]
    assert (row["num_images_unread"], row["num_query_images_unread"]) == (1, 0)
    # 102, 103, 101 of the first list; the second is as it was, both having cosine 1.
    assert row["mAP"] == pytest.approx(100 * ((1 + 2 / 3) / 3 + 1 / 2) / 2)
    lists = search_lists()
    boxes = [[c.box for c in row.candidates] for row in lists]
    unread_query = Reranker(lists, [boxes], cosines({100: "unread"}))
    assert unread_query(boxes)[0] == lists.lists[0]
    assert unread_query.facts == {"num_images_unread": 1, "num_query_images_unread": 1}


def test_candidates_without_a_box_are_described_by_the_search(folder):
    lists, asked = search_lists(), {}

    def describe(dataset, boxes):
        asked.setdefault("boxes", {i: rows.tolist() for i, rows in boxes.items()})
        return cosines({})(dataset, boxes)

    found = [[None] * len(row.candidates) for row in lists]
    assert len(Reranker(lists, [found], describe)(found)) == 2
    assert asked["boxes"][101] == [list(lists.lists[0].candidates[0].box)]


def test_describes_as_the_search_does_and_leaves_out_broken_images(folder, caplog):
    layers = ("FEWSHOT.RETRIEVAL.LAST", "res4", "FEWSHOT.RETRIEVAL.FINE", "res4")
    cfg = config(folder, *layers, "FEWSHOT.MAPPER", "EpisodicDatasetMapper")
    (folder / "1.png").write_bytes(b"no picture")
    torch.manual_seed(0)
    describer = reranking.build_describer(cfg)
    torch.manual_seed(0)
    boxes = {i: torch.tensor([[0.0, 0, 20, 10]]) for i in (100, 101, 102)}
    found = build_describe(cfg)("searched", boxes)
    assert found.keys() == {100, 102} and "1.png" in caplog.text
    one = {100: boxes[100]}
    expected = describe_boxes(cfg, build_index("searched", ()), one, describer=describer)
    assert torch.equal(found[100], expected[100])


def test_recall_table(folder):
    measured(folder)
    rows = list(csv.reader(io.StringIO((folder / "out" / "recall_iou.csv").read_text())))
    assert rows[0] == ["IoU", "search", "run: stage 0", "run: stage 1"] and len(rows) == 20
    by_iou = {row[0]: [float(v) for v in row[1:]] for row in rows[1:]}
    assert by_iou["0.50"] == [1, 0.75, 1] and by_iou["0.55"] == [0.25, 0.75, 1]


def test_files_of_a_report(folder):
    (folder / "run" / "config.yaml").write_text("SEED: 3\n")
    results = measured(folder, None, cosines({}), command="evaluate <search>")
    out = folder / "out"
    assert json.loads((out / "results.json").read_text())["runs"] == {
        "run": {"folder": str(folder / "run"), "seed": 3}
    }
    assert results["rank_lists"]["sha256"] == RankLists.load(folder / "lists.json").sha256
    text = (out / "report.html").read_text()
    page = Balanced()
    page.feed(text)
    assert not page.open_tags and page.scripts == 0
    assert all(address.startswith("data:image/") for address in page.addresses)
    # The curves and a picture for each query.
    assert len(page.addresses) == 3 and "evaluate &lt;search&gt;" in text
    assert {path.name for path in (out / "pictures").iterdir()} == {"run_7.jpg", "run_8.jpg"}
    # The query and its two true candidates beside each other.
    assert Image.open(out / "pictures" / "run_7.jpg").width == 3 * 400 + 2 * 10


def test_pictures_follow_the_seed_and_replace_unreadable_ones(folder):
    lists, images = search_lists(), GroundTruth.of_dataset("searched")
    truth = SearchTruth.of(lists, images, images)

    def drawn(seed):
        sets = lists, truth, images, images, PictureReader()
        return [
            (lists.lists[c.number].query_id, [*c.candidates])
            for c in choose_queries(*sets, seed=seed, num_queries=1, num_candidates=1)
        ]

    assert {str(drawn(seed)) for seed in range(20)} == {"[(7, [0])]", "[(7, [4])]", "[(8, [1])]"}
    assert [drawn(seed) for seed in range(9)] == [drawn(seed) for seed in range(9)]
    (folder / "0.png").write_bytes(b"no picture")
    results = measured(folder)
    assert results["drawn_query_ids"] == [8] and results["num_pictures_unread"] == 1
    (folder / "7.png").unlink()
    results = measured(folder)
    assert results["drawn_query_ids"] == [] and results["num_pictures_unread"] == 2


def test_search_alone_and_nothing_drawn(folder):
    results = measured(folder, {}, num_pictures=0)
    assert list(results["rows"]) == ["search"] and results["drawn_query_ids"] == []
    assert (folder / "out" / "report.html").is_file()


def test_what_is_undefined_is_null(folder):
    lists = search_lists()
    dataclasses.replace(lists, lists=lists.lists[:1]).save(folder / "lists.json")
    measured(folder, {})
    content = json.loads((folder / "out" / "results.json").read_text())
    assert content["rows"]["search"]["mIoU_ci95"] is None


def test_broken_and_missing_stages_are_skipped_by_name(folder, caplog):
    path = folder / "run" / "stage_1.json"
    path.write_bytes(path.read_bytes()[:50])
    results = measured(folder)
    assert list(results["rows"]) == ["search", "run: stage 1"]
    assert (
        "stage 0 is left out" in results["skipped"][0] and "stage_1.json" in results["skipped"][0]
    )
    assert (
        "stage_1.json" in caplog.text and "stage_1.json" in (folder / "out/report.html").read_text()
    )
    path.unlink()
    assert "stage_1.json" in measured(folder)["skipped"][0]
    # A stage under the name of another.
    path.write_bytes((folder / "run" / "stage_2.json").read_bytes())
    assert "must be of stage 1, got 2" in measured(folder)["skipped"][0]


def test_runs_without_stages_are_refused(folder):
    with pytest.raises(ValueError, match="run 'none' must have stage_1.json .* got none"):
        measured(folder, {"none": folder / "nowhere"})
    for number in (1, 2):
        (folder / "run" / f"stage_{number}.json").write_text("{")
    with pytest.raises(ValueError, match="got run: stage 0 is left out"):
        measured(folder)


def test_stages_of_other_lists_are_refused(folder):
    lists = search_lists()
    dataclasses.replace(lists, method="another").save(folder / "lists.json")
    with pytest.raises(ValueError, match="stage_1.json: .*other rank lists"):
        measured(folder)


def rewrite(folder, change):
    content = json.loads((folder / "instances.json").read_text())
    change(content)
    (folder / "instances.json").write_text(json.dumps(content))


def test_sets_without_a_truth_are_refused(folder):
    rewrite(folder, lambda content: content.update(annotations=[]))
    with pytest.raises(ValueError, match="searched must have annotations of the queries' labels"):
        measured(folder)


def test_labels_that_are_no_category_are_refused(folder):
    lists = search_lists()
    foreign = dataclasses.replace(lists.lists[1], label=12)
    dataclasses.replace(lists, lists=(lists.lists[0], foreign)).save(folder / "lists.json")
    with pytest.raises(ValueError, match="query 8: label must be a category of searched.* got 12"):
        measured(folder, {})


def test_labels_must_mean_the_same_in_both_sets(folder):
    other = folder / "other"
    other.mkdir()
    write_search_set(other)
    rewrite(other, lambda content: content["categories"][1].update(name="c"))
    search_lists(query_dataset="elsewhere").save(folder / "lists.json")
    with (
        registered_set("elsewhere", other),
        pytest.raises(ValueError, match="query 8: label 11 must be the same .*'b' and 'c'"),
    ):
        measured(folder, {})


def run_tool(*arguments):
    path = ROOT / "tools/evaluate_search.py"
    spec = importlib.util.spec_from_file_location("evaluate_search", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main([str(argument) for argument in arguments])


def arguments_of(folder, *more):
    keys = ["FEWSHOT.SELF_PACED.RANK_LISTS", folder / "lists.json", "OUTPUT_DIR", folder / "run"]
    files = ["--config-file", TINY_SPIL, "--output", folder / "out"]
    return [*files, *more, *TINY_SPIL_OVERRIDES, *keys]


def test_tool_prints_and_leaves_the_run_as_it_is(folder, capsys):
    before = {path.name: path.read_bytes() for path in (folder / "run").iterdir()}
    run_tool(*arguments_of(folder))
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("run: stage 1") and "100.0" in line]
    assert line.split()[3:6] == ["100.0", "±", "0.0"]
    assert search_lists().sha256 in lines[-1]
    assert {path.name: path.read_bytes() for path in (folder / "run").iterdir()} == before
    run_tool(*arguments_of(folder, "--run", f"A={folder}/run", "--run", f"B={folder}/run"))
    assert "B: stage 1" in capsys.readouterr().out
    run_tool(*arguments_of(folder, "--search-only"))
    assert "stage" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--run", "folder"], "--run must be NAME=FOLDER"),
        (["--run", "a/b=folder"], "--run must be NAME=FOLDER"),
        (["--run", "a=x", "--run", "a=y"], "different names"),
        (["--run", "a=nowhere"], "run 'a' must have stage_1.json"),
    ],
)
def test_tool_ends_bad_input_with_one_line(folder, more, message):
    with pytest.raises(SystemExit, match=f"evaluate_search: .*{message}"):
        run_tool(*arguments_of(folder, *more))
    assert not (folder / "out" / "results.json").exists()
