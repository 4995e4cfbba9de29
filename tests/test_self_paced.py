"""Self-paced training end to end on a small set: stages, files, resuming; and what it never reads."""

import dataclasses
import json
import logging
from dataclasses import replace

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from factories import TINY_SPIL, TINY_SPIL_OVERRIDES, registered_set, write_set

from fewshot_d2 import load_config
from fewshot_d2.data.loaders import build_training_episodes, pool_indices
from fewshot_d2.data.pseudo_labels import PseudoLabels, ScoredBox
from fewshot_d2.data.rank_lists import Candidate, RankList, RankLists
from fewshot_d2.engine import candidate_search
from fewshot_d2.engine.candidate_search import search_candidates
from fewshot_d2.engine.self_paced import labels_file, stage_config, train_self_paced

BOX = (10.0, 5.0, 35.0, 30.0)


@pytest.fixture
def folder(tmp_path):
    """A registered set and rank lists of three queries over it."""
    path = tmp_path / "data"
    path.mkdir()
    write_set(path, num_images=9)
    lists = tuple(
        RankList(
            query_id=7 + i,
            image_id=100 + i,
            box=BOX,
            label=i,
            # Lists of two instances share no image.
            candidates=tuple(Candidate(103 + 2 * i + j, 0.9 - 0.1 * j, BOX) for j in range(2)),
        )
        for i in range(3)
    )
    RankLists("pool_set", "pool_set", "by hand", lists).save(path / "rank_lists.json")
    with registered_set("pool_set", path):
        yield path


def config(folder, output, *overrides):
    return load_config(
        str(TINY_SPIL),
        [
            *TINY_SPIL_OVERRIDES,
            *("FEWSHOT.SELF_PACED.RANK_LISTS", str(folder / "rank_lists.json")),
            # Untrained networks are sure of nothing; all they find is learned from.
            *("FEWSHOT.SELF_PACED.THRESHOLDS", (0.0, 0.0), "FEWSHOT.SELF_PACED.MAX_ITER", 2),
            *("FEWSHOT.SELF_PACED.STEPS", (), "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ()),
            *("FEWSHOT.SUPERPIXELS.FOLDER", str(folder / "superpixels")),
            *("SOLVER.IMS_PER_BATCH", 2, "FEWSHOT.NUM_SHOTS", 2, "OUTPUT_DIR", str(output)),
            *overrides,
        ],
    )


def run_stages(cfg, *, resume):
    """The stages, seeded as the command line does it."""
    torch.manual_seed(0)
    return train_self_paced(cfg, resume=resume)


def result_of(output, stage):
    return torch.load(output / f"stage_{stage}" / "model_final.pth", weights_only=True)["model"]


def assert_same_run(one, other, *, stages):
    for stage in range(stages):
        names = labels_file(one, stage + 1), labels_file(other, stage + 1)
        assert names[0].read_bytes() == names[1].read_bytes()
        weights = result_of(one, stage), result_of(other, stage)
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_stages_follow_each_other_and_resume_anywhere(folder, tmp_path, caplog):
    whole = run_stages(config(folder, tmp_path / "whole"), resume=False)
    assert [labels.stage for labels in whole] == [1, 2, 3]
    assert all(any(labels.confident(row) for row in range(3)) for labels in whole)
    # Every stage has moved the weights of the one before.
    weights = [result_of(tmp_path / "whole", stage) for stage in range(3)]
    for before, after in zip(weights, weights[1:]):
        assert any(not torch.equal(before[name], after[name]) for name in before)

    # Stopped at a boundary, within a stage, and between training and search.
    output = tmp_path / "pieces"
    run_stages(config(folder, output, "FEWSHOT.SELF_PACED.THRESHOLDS", ()), resume=False)
    labels_file(output, 1).unlink()
    # The stage file is cut off.
    run_stages(config(folder, output), resume=True)
    content = labels_file(output, 3).read_bytes()
    labels_file(output, 3).write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        run_stages(config(folder, output), resume=True)
    assert "searched again" in caplog.text and "stage_3.json" in caplog.text
    assert_same_run(tmp_path / "whole", output, stages=3)


def test_resumes_within_a_stage(folder, tmp_path):
    keys = ["SOLVER.CHECKPOINT_PERIOD", 1, "FEWSHOT.SELF_PACED.THRESHOLDS", (0.0,)]
    run_stages(config(folder, tmp_path / "whole", *keys), resume=False)
    run_stages(config(folder, tmp_path / "cut", *keys), resume=False)
    # What is there when stage 1 is killed after its first iteration.
    stage = tmp_path / "cut" / "stage_1"
    for name in ("model_final.pth", "model_0000001.pth"):
        (stage / name).unlink(missing_ok=True)
    (stage / "last_checkpoint").write_text("model_0000000.pth")
    labels_file(tmp_path / "cut", 2).unlink()
    run_stages(config(folder, tmp_path / "cut", *keys), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", stages=2)


def test_another_run_is_not_overwritten_or_mixed_up(folder, tmp_path):
    keys = ["FEWSHOT.SELF_PACED.THRESHOLDS", ()]
    run_stages(config(folder, tmp_path / "run", *keys), resume=False)
    with pytest.raises(ValueError, match="--resume"):
        run_stages(config(folder, tmp_path / "run", *keys), resume=False)
    lists = RankLists.load(folder / "rank_lists.json")
    RankLists(lists.dataset, lists.query_dataset, "other", lists.lists[:2]).save(
        folder / "rank_lists.json"
    )
    with pytest.raises(ValueError, match="other rank lists"):
        run_stages(config(folder, tmp_path / "run", *keys), resume=True)


def test_run_keeps_to_its_lists_before_a_stage_has_ended(folder, tmp_path):
    """Stage 0 is trained and not yet searched, so no stage file tells what it was trained on."""
    keys = ["FEWSHOT.SELF_PACED.THRESHOLDS", ()]
    run_stages(config(folder, tmp_path / "run", *keys), resume=False)
    labels_file(tmp_path / "run", 1).unlink()
    lists = RankLists.load(folder / "rank_lists.json")
    replace(lists, lists=lists.lists[:2]).save(folder / "rank_lists.json")
    with pytest.raises(ValueError, match=f"other rank lists.* {lists.sha256}, got "):
        run_stages(config(folder, tmp_path / "run", *keys), resume=True)
    lists.save(folder / "rank_lists.json")
    (labels,) = run_stages(config(folder, tmp_path / "run", *keys), resume=True)
    labels.check(lists)


def test_lists_without_any_candidate_are_refused_before_training(folder, tmp_path):
    lists = RankLists.load(folder / "rank_lists.json")
    empty = tuple(replace(row, candidates=()) for row in lists)
    replace(lists, lists=empty).save(folder / "rank_lists.json")
    with pytest.raises(ValueError, match=r"rank_lists\.json must have candidates, got none in 3"):
        run_stages(config(folder, tmp_path / "run"), resume=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        ({"box": (70.0, 5.0, 90.0, 30.0)}, "query 8 .* image 101 must have an area inside"),
        ({"candidates": (Candidate(999, 0.5, BOX),)}, "query 8 .* got 999"),
    ],
)
def test_lists_that_do_not_fit_their_data_set_are_refused(folder, tmp_path, spoiled, words):
    """Before training, and where a trained network searches without any."""
    lists = RankLists.load(folder / "rank_lists.json")
    first, second, third = lists.lists
    lists = replace(lists, lists=(first, replace(second, **spoiled), third))
    lists.save(folder / "rank_lists.json")
    cfg = config(folder, tmp_path / "run")
    with pytest.raises(ValueError, match=words):
        run_stages(cfg, resume=False)
    with pytest.raises(ValueError, match=words):
        search_candidates(cfg, build_model(cfg), lists, stage=1, threshold=0.5)


def test_an_empty_list_among_others_is_found_nothing_for(folder, tmp_path):
    lists = RankLists.load(folder / "rank_lists.json")
    rows = (replace(lists.lists[0], candidates=()), *lists.lists[1:])
    replace(lists, lists=rows).save(folder / "rank_lists.json")
    keys = ["FEWSHOT.SELF_PACED.THRESHOLDS", (0.0,)]
    for labels in run_stages(config(folder, tmp_path / "run", *keys), resume=False):
        assert labels.found[0] == () and all(labels.found[1])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("FEWSHOT.TRAIN_ON", "episodes"), "TRAIN_ON must be 'rank_lists'"),
        (("FEWSHOT.SELF_PACED.RANK_LISTS", ""), "RANK_LISTS a file, got 'rank_lists' and ''"),
        (("FEWSHOT.SELF_PACED.THRESHOLDS", (0.99, 89.0)), r"THRESHOLDS must be in \[0, 1\]"),
        (("FEWSHOT.SELF_PACED.BOXES_PER_IMAGE", 0), "BOXES_PER_IMAGE at least 1"),
        (("FEWSHOT.SELF_PACED.MAX_ITER", 0), "SELF_PACED.MAX_ITER must be at least 1"),
        (
            ("SOLVER.MAX_ITER", 0, "MODEL.WEIGHTS", "x.pth"),
            "MAX_ITER must be .* none, got 0, 'x.pth'",
        ),
    ],
)
def test_what_would_fail_after_a_stage_is_refused_before(folder, tmp_path, keys, words):
    with pytest.raises(ValueError, match=words):
        run_stages(config(folder, tmp_path / "run", *keys), resume=False)
    assert not (tmp_path / "run").exists()


def test_trained_network_on_new_lists_without_training(folder, tmp_path):
    keys = ["FEWSHOT.SELF_PACED.THRESHOLDS", ()]
    run_stages(config(folder, tmp_path / "run", *keys), resume=False)
    lists = RankLists.load(folder / "rank_lists.json")
    replace(lists, lists=lists.lists[1:]).save(folder / "rank_lists.json")
    weights = str(tmp_path / "run" / "stage_0" / "model_final.pth")
    keys += ["SOLVER.MAX_ITER", 0, "MODEL.WEIGHTS", weights]
    (found,) = run_stages(config(folder, tmp_path / "new", *keys), resume=False)
    assert found.found == PseudoLabels.load(labels_file(tmp_path / "run", 1)).found[1:]
    assert not (tmp_path / "new" / "stage_0").exists()


def test_stage_configs(folder, tmp_path):
    cfg = config(folder, tmp_path, "SOLVER.MAX_ITER", 5, "SOLVER.WARMUP_ITERS", 3)
    first, second = stage_config(cfg, 0), stage_config(cfg, 1)
    assert (first.SOLVER.MAX_ITER, first.SOLVER.WARMUP_ITERS) == (5, 3)
    assert first.FEWSHOT.SELF_PACED.LABELS == ""
    assert (second.SOLVER.MAX_ITER, second.SOLVER.WARMUP_ITERS) == (2, 0)
    labels, weights = second.FEWSHOT.SELF_PACED.LABELS, second.MODEL.WEIGHTS
    assert labels == str(tmp_path / "stage_1.json")
    assert weights == str(tmp_path / "stage_0" / "model_final.pth")


def test_run_goes_on_with_more_stages_but_not_with_other_thresholds(folder, tmp_path):
    def run(*thresholds):
        keys = ["FEWSHOT.SELF_PACED.THRESHOLDS", thresholds]
        return run_stages(config(folder, tmp_path / "run", *keys), resume=True)

    (found,) = run()
    first, last = run(0.25)
    assert first.found == found.found and (first.threshold, last.threshold) == (0.25, 0.25)
    assert PseudoLabels.load(labels_file(tmp_path / "run", 1)).threshold == 0.25
    with pytest.raises(ValueError, match="0.5 .* got 0.25, which stage 1 has learned from"):
        run(0.5)


def episodes_of(folder, output, *overrides, number=20):
    episodes = build_training_episodes(config(folder, output, *overrides))
    return [episodes[i] for i in range(number)]


@pytest.mark.parametrize("flip", ["none", "horizontal"])
def test_no_annotation_of_the_data_set_reaches_training(folder, tmp_path, flip):
    """Other boxes and classes in the json, the same episodes: bit by bit."""
    keys = ["INPUT.RANDOM_FLIP", flip]
    before = episodes_of(folder, tmp_path, *keys)
    assert any(len(x["instances"]) for x in before)
    content = json.loads((folder / "instances.json").read_text())
    for annotation in content["annotations"]:
        annotation.update(bbox=[1, 2, 3, 4], category_id=5, iscrowd=0, segmentation=[])
    (folder / "instances.json").write_text(json.dumps(content))
    after = episodes_of(folder, tmp_path, *keys)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["superpixels"], other["superpixels"])
        assert torch.equal(one["instances"].gt_boxes.tensor, other["instances"].gt_boxes.tensor)
        for shots, others in zip(one["support"].examples, other["support"].examples):
            assert all(torch.equal(a.image, b.image) for a, b in zip(shots, others, strict=True))
        assert not one["instances"].has("gt_masks")


def test_episodes_have_the_boxes_and_weights_of_the_pool(folder, tmp_path):
    lists = RankLists.load(folder / "rank_lists.json")
    found = tuple(
        tuple(
            (ScoredBox((2.0 + row, 3.0, 30.0, 20.0 + place), 0.95 - 0.1 * place),)
            for place in (0, 1)
        )
        for row in range(3)
    )
    PseudoLabels(1, 0.9, lists.sha256, found).save(tmp_path / "stage_1.json")
    keys = [
        "FEWSHOT.SELF_PACED.LABELS",
        str(tmp_path / "stage_1.json"),
        "INPUT.RANDOM_FLIP",
        "none",
    ]
    episodes = build_training_episodes(config(folder, tmp_path, *keys))
    seen = set()
    for number in range(40):
        drawn, mapped = episodes.pool.sample(number), episodes[number]
        assert mapped["weights"] == [drawn.target.weight, 1.0]
        scale = mapped["image"].shape[2] / mapped["width"]
        expected = torch.tensor(drawn.target.boxes) * scale
        assert torch.allclose(mapped["instances"].gt_boxes.tensor, expected, atol=0.6)
        assert mapped["instances"].gt_classes.tolist() == [0]
        assert mapped["superpixels"].shape == mapped["image"].shape[1:]
        ids = [lists.lists[row].query_id for row in (drawn.query_row, drawn.negative_row)]
        assert mapped["support"].class_ids == ids
        seen.add(drawn.target.is_query)
    assert seen == {True, False}


def test_boxes_of_a_foreign_search_end_where_the_picture_does(folder, tmp_path):
    lists = RankLists.load(folder / "rank_lists.json")

    def shots(of_queries):
        """Crops of episodes in which every box is ``of_queries``."""
        rows = tuple(
            dataclasses.replace(
                row,
                box=of_queries,
                candidates=tuple(dataclasses.replace(c, box=of_queries) for c in row.candidates),
            )
            for row in lists
        )
        dataclasses.replace(lists, lists=rows).save(folder / "rank_lists.json")
        episodes = episodes_of(folder, tmp_path)
        classes = [shots for x in episodes for shots in x["support"].examples]
        return [shot.image for shots in classes for shot in shots]

    outside, inside = shots((-9.0, -7.5, 35.0, 30.0)), shots((0.0, 0.0, 35.0, 30.0))
    assert all(map(torch.equal, outside, inside))
    assert not any(map(torch.equal, shots(BOX), inside))


def test_without_contrast_episodes_have_one_class(folder, tmp_path):
    for query in episodes_of(folder, tmp_path, "FEWSHOT.NUM_ABSENT_WAYS", 0):
        assert len(query["support"]) == 1 and query["weights"] == [1.0]


def test_masks_of_boxes_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="MASK_ON"):
        episodes_of(folder, tmp_path, "FEWSHOT.MAPPER", "EpisodicDatasetMapper")


@torch.no_grad()
def test_search_finds_the_best_box_of_each_candidate(folder, tmp_path):
    """Against one image and one query at a time."""
    cfg = config(folder, tmp_path)
    lists = RankLists.load(folder / "rank_lists.json")
    torch.manual_seed(0)
    model = build_model(cfg)
    labels = search_candidates(cfg, model, lists, stage=2, threshold=0.3)
    assert (labels.stage, labels.threshold) == (2, 0.3)
    labels.check(lists)
    model.eval()
    query_index, index = pool_indices(lists)
    mapper = candidate_search.build_mapper(cfg, is_train=False)
    features = candidate_search.encode_queries(model, lists, query_index, mapper)
    images = candidate_search.CandidateImages(lists, index, mapper)
    num_places = 0
    for query in images:
        for row, position in query["places"]:
            found = model([{**query, "support_features": features[[row]]}])[0]["instances"]
            (box,) = labels.found[row][position]
            best = found.scores.argmax()
            assert abs(box.score - float(found.scores[best])) < 1e-4
            assert torch.allclose(torch.tensor(box.box), found.pred_boxes.tensor[best], atol=1e-2)
            num_places += 1
    assert num_places == sum(len(row.candidates) for row in lists)


def test_unreadable_candidate_is_left_out_by_name(folder, tmp_path, caplog):
    (folder / "3.png").write_bytes(b"no picture")
    cfg = config(folder, tmp_path)
    torch.manual_seed(0)
    lists = RankLists.load(folder / "rank_lists.json")
    labels = search_candidates(cfg, build_model(cfg), lists, stage=1, threshold=0.3)
    assert "3.png" in caplog.text
    assert labels.found[0][0] == () and labels.found[0][1]


def test_trains_on_a_stage(folder, tmp_path):
    """Losses of a mapped batch are finite, with masks from superpixels."""
    cfg = config(folder, tmp_path)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    with EventStorage(0):
        losses = model(episodes_of(folder, tmp_path, number=2))
    assert losses["loss_mask"] > 0 and all(torch.isfinite(loss) for loss in losses.values())
