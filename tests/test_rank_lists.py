"""Rank-list files: what is saved is loaded, a broken file is refused by name, boxes must be inside their images."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from plan_cases import make_index
from rank_list_cases import NO_BOXES, NO_DOCUMENTS, NO_NUMBERS, random_rank_lists, with_value

from fewshot_d2.data.rank_lists import Candidate, RankList, RankLists

BOX = (1.0, 1.0, 8.0, 8.0)
# Of images of ``plan_cases.make_index()``, which are 9 x 9 pixels.
LISTS = RankLists(
    "base",
    "queries",
    "by hand",
    (
        RankList(5, 1000, BOX, 3, (Candidate(1003, 0.75, BOX), Candidate(1006, -0.5, BOX))),
        RankList(9, 1009, (0.5, 0.25, 2.0, 9.0), 4, ()),
    ),
)
# Of ``LISTS``. It must not change: pseudo labels know the lists they are of by it.
STORED_SHA256 = "536fc0e30d7894561e1b3668d9f226754f5f45e5bdf52bbb884579373990100c"


@pytest.fixture
def content(tmp_path):
    LISTS.save(tmp_path / "good.json")
    return json.loads((tmp_path / "good.json").read_text())


def refused(folder, text, words):
    (folder / "broken.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"broken\.json must be a rank-list file, got: .*{words}"):
        RankLists.load(folder / "broken.json")


@pytest.mark.parametrize("seed", range(10))
def test_saved_lists_load_as_they_were(tmp_path, seed):
    lists = random_rank_lists(np.random.default_rng(seed), one_set=seed % 2 == 0)
    path = tmp_path / "new" / "lists.json"
    lists.save(path)
    loaded = RankLists.load(path)
    assert loaded == lists and loaded.sha256 == lists.sha256
    assert len(loaded) == len(lists) == 8 and [*loaded] == [*lists.lists]
    other = random_rank_lists(np.random.default_rng(seed + 100), one_set=seed % 2 == 0)
    assert loaded != other and loaded.sha256 != other.sha256


def test_hash_is_of_the_content(tmp_path, content):
    assert LISTS.sha256 == STORED_SHA256
    path = tmp_path / "lists.json"
    path.write_text(json.dumps(dict(reversed(content.items())), indent=3))
    assert RankLists.load(path).sha256 == STORED_SHA256
    path.write_text(json.dumps(with_value(content, ("lists", 0, "box", 0), 1)))
    assert RankLists.load(path).sha256 == STORED_SHA256
    for place, value in [
        (("method",), "x"),
        (("lists", 1, "label"), 7),
        (("lists", 0, "candidates", 0, "box", 2), 8.5),
        (("lists", 0, "candidates", 1, "score"), -0.25),
    ]:
        path.write_text(json.dumps(with_value(content, place, value)))
        assert RankLists.load(path).sha256 != STORED_SHA256, place


def test_hash_of_lists_with_other_kinds_of_numbers_is_that_of_their_file(tmp_path):
    """Boxes of whole numbers or out of arrays: pseudo labels made before a restart must fit after it."""
    first = LISTS.lists[0]
    candidates = tuple(
        replace(c, score=np.float32(c.score), box=tuple(np.float32(c.box)))
        for c in first.candidates
    )
    whole = replace(first, box=(1, 1, 8, 8), candidates=candidates)
    lists = replace(LISTS, lists=(whole, LISTS.lists[1]))
    lists.save(tmp_path / "lists.json")
    assert lists.sha256 == RankLists.load(tmp_path / "lists.json").sha256 == STORED_SHA256


def test_file_that_was_cut_off(tmp_path):
    LISTS.save(tmp_path / "lists.json")
    whole = (tmp_path / "lists.json").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "lists.json").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"lists\.json must be a rank-list file"):
            RankLists.load(tmp_path / "lists.json")


def test_file_with_a_wrong_byte(tmp_path):
    """It may still be one, of other values; else the error is about this file."""
    LISTS.save(tmp_path / "lists.json")
    whole = (tmp_path / "lists.json").read_bytes()
    rng, num_refused = np.random.default_rng(0), 0
    for place in range(len(whole)):
        spoiled = bytearray(whole)
        spoiled[place] = rng.integers(256)
        (tmp_path / "lists.json").write_bytes(spoiled)
        try:
            RankLists.load(tmp_path / "lists.json")
        except ValueError as error:
            assert "lists.json must be a rank-list file" in str(error)
            num_refused += 1
    assert num_refused > len(whole) / 2


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("format",), "fewshot_d2/pseudo_labels", "format must be fewshot_d2/rank_lists version 1"),
        (("version",), 2, "format must be fewshot_d2/rank_lists version 1"),
        (("version",), ..., "format must be"),
        (("dataset",), ..., "dataset must be of type str, got None"),
        (("query_dataset",), 7, "query_dataset must be of type str, got 7"),
        (("method",), ["x"], r"method must be of type str, got \['x'\]"),
        (("lists",), ..., "lists must be a list, got None"),
        (("lists",), {}, "lists must be a list, got {}"),
        (("lists",), [], "must have queries with unique ids"),
        (("lists", 1), [1], r"lists\[1\] must be an object of \['box', 'candidates'"),
        (("lists", 1, "label"), ..., r"lists\[1\] must be an object of"),
        (("lists", 1, "labels"), 4, r"lists\[1\] must be an object of"),
        (("lists", 1, "query_id"), 5, r"unique ids, got \[5, 5\]"),
        (("lists", 1, "query_id"), "9", r"lists\[1\]: query_id must be of type int"),
        (("lists", 0, "image_id"), 1.0, r"lists\[0\]: image_id must be of type int, got 1.0"),
        (("lists", 0, "label"), True, r"lists\[0\]: label must be of type int, got True"),
        (("lists", 0, "candidates"), None, "candidates must be a list, got None"),
        (("lists", 0, "candidates", 1), 7, r"lists\[0\]: candidate 1 must be an object of"),
        (("lists", 0, "candidates", 1, "image_id"), None, "candidate 1: image_id must be of type"),
        (("lists", 0, "candidates", 1, "image_id"), 1003, "query 5: each image must be listed"),
        (("lists", 0, "candidates", 1, "score"), 0.8, "query 5: scores must be finite and fall"),
        (("lists", 0, "candidates", 1, "score"), float("nan"), "query 5: scores must be finite"),
        (("lists", 0, "candidates", 0, "score"), float("inf"), "query 5: scores must be finite"),
    ],
)
def test_broken_file_is_named(tmp_path, content, place, value, words):
    refused(tmp_path, json.dumps(with_value(content, place, value)).encode(), words)


@pytest.mark.parametrize("place", [("lists", 1), ("lists", 0, "candidates", 1)])
@pytest.mark.parametrize(("box", "words"), NO_BOXES)
def test_what_is_no_box_is_named(tmp_path, content, place, box, words):
    text = json.dumps(with_value(content, (*place, "box"), box))
    refused(tmp_path, text.encode(), rf"(lists\[{place[1]}\]|query {[5, 9][place[1]]}).*{words}")


@pytest.mark.parametrize(("number", "words"), NO_NUMBERS, ids=lambda v: str(v)[:20])
def test_what_is_no_number_is_named(tmp_path, content, number, words):
    text = json.dumps(with_value(content, ("lists", 0, "candidates", 1, "score"), number))
    refused(tmp_path, text.encode(), rf"lists\[0\]: candidate 1: score {words}")


@pytest.mark.parametrize(("text", "words"), NO_DOCUMENTS)
def test_what_is_no_document_is_named(tmp_path, text, words):
    refused(tmp_path, text, words)


def test_lists_that_fit_their_data_sets():
    index, queries = make_index(), make_index()
    LISTS.check(queries, index)
    # Searched boxes may overhang; only what is inside counts.
    row = LISTS.lists[0]
    overhanging = replace(row.candidates[0], box=(-5.0, -1.0, 0.5, 99.0))
    replace(LISTS, lists=(replace(row, candidates=(overhanging,)),)).check(queries, index)


@pytest.mark.parametrize(
    "box",
    [(9, 1, 12, 5), (-3, 1, 0, 5), (1, 9.5, 5, 12), (1, -4, 5, -1), (20, 20, 30, 30)],
)
def test_box_outside_its_image_is_named(box):
    row, index = LISTS.lists[0], make_index()
    outside = rf"must have an area inside its 9 x 9 pixels, got {re.escape(str(list(box)))}"
    spoiled = replace(LISTS, lists=(replace(row, box=box),))
    with pytest.raises(ValueError, match=f"query 5 .*: the box in image 1000 {outside}"):
        spoiled.check(index, index)
    candidates = (row.candidates[0], replace(row.candidates[1], box=box))
    spoiled = replace(LISTS, lists=(replace(row, candidates=candidates),))
    with pytest.raises(ValueError, match=f"query 5 .*: the box in image 1006 {outside}"):
        spoiled.check(index, index)


def test_unknown_image_is_named_with_its_query():
    known, other = make_index(), make_index(num_images=1)
    with pytest.raises(ValueError, match="query 5 of the rank lists .* got 1003"):
        LISTS.check(known, other)
    with pytest.raises(ValueError, match="query 9 of the rank lists .* got 1009"):
        LISTS.check(make_index(num_images=3), known)
