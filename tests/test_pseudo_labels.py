"""Pseudo-label files: what is confident, what is saved is loaded, broken and foreign files are refused by name."""

import json
from dataclasses import replace

import numpy as np
import pytest
from rank_list_cases import (
    NO_BOXES,
    NO_DOCUMENTS,
    NO_NUMBERS,
    random_labels,
    random_rank_lists,
    with_value,
)

from fewshot_d2.data.pseudo_labels import PseudoLabels, ScoredBox

BOX = (1.0, 2.0, 30.0, 40.0)


def scored(*scores):
    return tuple(ScoredBox(BOX, score) for score in scores)


LABELS = PseudoLabels(
    stage=2,
    threshold=0.5,
    rank_lists_sha256="ab",
    found=((scored(0.75, 0.5), (), scored(1.0, 0.625, 0.0)), (), (scored(0.5),)),
)


@pytest.fixture
def content(tmp_path):
    LABELS.save(tmp_path / "good.json")
    return json.loads((tmp_path / "good.json").read_text())


def refused(folder, text, words):
    (folder / "broken.json").write_bytes(text)
    expected = rf"broken\.json must be a pseudo-label file, got: .*{words}"
    with pytest.raises(ValueError, match=expected):
        PseudoLabels.load(folder / "broken.json")


def test_confident_is_above_the_threshold():
    assert LABELS.confident(0) == {0: scored(0.75), 2: scored(1.0, 0.625)}
    assert LABELS.confident(1) == LABELS.confident(2) == {}
    assert LABELS.num_confident == 2
    assert replace(LABELS, threshold=0.49).confident(2) == {0: scored(0.5)}
    assert replace(LABELS, threshold=0.49).num_confident == 3
    assert replace(LABELS, threshold=1.0).num_confident == 0
    assert replace(LABELS, found=()).num_confident == 0


@pytest.mark.parametrize("seed", range(10))
def test_confident_by_loops(seed):
    rng = np.random.default_rng(seed)
    lists = random_rank_lists(rng)
    labels = random_labels(rng, lists, threshold=float(rng.uniform()))
    total = 0
    for i, row in enumerate(lists):
        expected = {}
        for position in range(len(row.candidates)):
            for box in labels.found[i][position]:
                if box.score > labels.threshold:
                    expected[position] = (*expected.get(position, ()), box)
        assert labels.confident(i) == expected
        total += len(expected)
    assert labels.num_confident == total


@pytest.mark.parametrize("seed", range(10))
def test_saved_labels_load_as_they_were(tmp_path, seed):
    rng = np.random.default_rng(seed)
    lists = random_rank_lists(rng)
    labels, other = random_labels(rng, lists, stage=3, threshold=0.79), random_labels(rng, lists)
    labels.save(tmp_path / "new" / "labels.json")
    loaded = PseudoLabels.load(tmp_path / "new" / "labels.json")
    assert loaded == labels != other
    loaded.check(lists)


def test_numbers_out_of_arrays_are_saved(tmp_path):
    box = ScoredBox(tuple(np.float32(BOX)), np.float32(0.75))
    replace(LABELS, found=(((box,),),)).save(tmp_path / "labels.json")
    loaded = PseudoLabels.load(tmp_path / "labels.json")
    assert loaded.found == ((scored(0.75),),)


def test_file_that_was_cut_off(tmp_path):
    path = tmp_path / "labels.json"
    LABELS.save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"labels\.json must be a pseudo-label file"):
            PseudoLabels.load(path)


def test_file_with_a_wrong_byte(tmp_path):
    path = tmp_path / "labels.json"
    LABELS.save(path)
    whole = path.read_bytes()
    rng, num_refused = np.random.default_rng(0), 0
    for place in range(len(whole)):
        spoiled = bytearray(whole)
        spoiled[place] = rng.integers(256)
        path.write_bytes(spoiled)
        try:
            PseudoLabels.load(path)
        except ValueError as error:
            assert "labels.json must be a pseudo-label file" in str(error)
            num_refused += 1
    assert num_refused > len(whole) / 2


FIRST = ("found", 0, 0, 0)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("format",), "fewshot_d2/rank_lists", "format must be fewshot_d2/pseudo_labels version 1"),
        (("version",), 2, "format must be"),
        (("stage",), ..., "stage must be of type int, got None"),
        (("stage",), "1", "stage must be of type int, got '1'"),
        (("stage",), True, "stage must be of type int, got True"),
        (("stage",), 0, "stage must be at least 1 .* got 0 and 0.5"),
        (("threshold",), ..., "threshold must be a number, got None"),
        (("threshold",), 1.5, r"threshold in \[0, 1\], got 2 and 1.5"),
        (("threshold",), -0.5, r"threshold in \[0, 1\], got 2 and -0.5"),
        (("threshold",), float("nan"), r"threshold in \[0, 1\], got 2 and nan"),
        (("rank_lists_sha256",), ..., "rank_lists_sha256 must be of type str, got None"),
        (("rank_lists_sha256",), 7, "rank_lists_sha256 must be of type str, got 7"),
        (("found",), ..., "found must be a list, got None"),
        (("found", 1), {}, r"found\[1\] must be a list, got {}"),
        (("found", 0, 2), "x", r"found\[0\]\[2\] must be a list, got x"),
        (FIRST, 0.9, r"found\[0\]\[0\] must be an object of \['box', 'score'\]"),
        ((*FIRST, "score"), ..., r"found\[0\]\[0\] must be an object of \['box', 'score'\]"),
        ((*FIRST, "label"), 1, r"found\[0\]\[0\] must be an object of \['box', 'score'\]"),
        ((*FIRST, "score"), 0.25, r"found\[0\]\[0\]: scores must .*fall.* got \[0.25, 0.5\]"),
        ((*FIRST, "score"), 1.5, r"found\[0\]\[0\]: scores must be in \[0, 1\]"),
        (("found", 2, 0, 0, "score"), -0.5, r"found\[2\]\[0\]: scores must be in \[0, 1\]"),
        (("found", 2, 0, 0, "score"), float("nan"), r"found\[2\]\[0\]: scores must be in \[0, 1\]"),
        (("found", 2, 0, 0, "score"), float("inf"), r"found\[2\]\[0\]: scores must be in \[0, 1\]"),
    ],
)
def test_broken_file_is_named(tmp_path, content, place, value, words):
    refused(tmp_path, json.dumps(with_value(content, place, value)).encode(), words)


@pytest.mark.parametrize(("box", "words"), NO_BOXES)
def test_what_is_no_box_is_named(tmp_path, content, box, words):
    text = json.dumps(with_value(content, (*FIRST, "box"), box))
    refused(tmp_path, text.encode(), rf"found\[0\]\[0\]: .*{words}")


@pytest.mark.parametrize(("number", "words"), NO_NUMBERS, ids=lambda v: str(v)[:20])
def test_what_is_no_number_is_named(tmp_path, content, number, words):
    text = json.dumps(with_value(content, (*FIRST, "score"), number))
    refused(tmp_path, text.encode(), rf"found\[0\]\[0\]: score {words}")


@pytest.mark.parametrize(("text", "words"), NO_DOCUMENTS)
def test_what_is_no_document_is_named(tmp_path, text, words):
    path = tmp_path / "broken.json"
    path.write_bytes(text)
    with pytest.raises(
        ValueError, match=rf"broken\.json must be a pseudo-label file, got: .*{words}"
    ):
        PseudoLabels.load(path)


def test_labels_of_other_lists_are_refused():
    rng = np.random.default_rng(0)
    lists, others = random_rank_lists(rng), random_rank_lists(rng)
    labels = random_labels(rng, lists, stage=3)
    labels.check(lists)
    words = "pseudo labels of stage 3 were made for other rank lists"
    with pytest.raises(ValueError, match=f"{words}.* {lists.sha256}, .* got {others.sha256}"):
        labels.check(others)
    with pytest.raises(ValueError, match=f"{words}.* 7 lists"):
        replace(labels, found=labels.found[:-1]).check(lists)
    longer = (*labels.found[0], ())
    with pytest.raises(ValueError, match=words):
        replace(labels, found=(longer, *labels.found[1:])).check(lists)
