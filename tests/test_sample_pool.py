"""The sample pool: its rules by loops over random rank lists, its probabilities, and lists that run short.

Tolerances of counts are five standard deviations of the binomial, with fixed seeds.
"""

import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from rank_list_cases import (
    BOX,
    QUERY_BOX,
    PoolRules,
    is_negative,
    labels_of,
    listed,
    random_labels,
    random_rank_lists,
)

from fewshot_d2.data.pseudo_labels import PseudoLabels, ScoredBox
from fewshot_d2.data.sample_pool import Place, SamplePool


def samples(lists, labels, count, **options):
    pool = SamplePool(lists, labels, **{"seed": 0, **options})
    return [pool.sample(t) for t in range(count)]


def assert_binomial(hits, tries, probability):
    tolerance = 5 * (tries * probability * (1 - probability)) ** 0.5
    assert abs(hits - tries * probability) < tolerance, (hits, tries * probability, tolerance)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("one_set", [True, False])
@pytest.mark.parametrize("seed", range(15))
def test_every_rule_on_random_lists(seed, one_set, stage):
    rng = np.random.default_rng(seed)
    depths = [(0, 4), (0, 12), (8, 25)][seed % 3]
    lists = random_rank_lists(rng, depths=depths, one_set=one_set)
    labels = random_labels(rng, lists, threshold=rng.choice([0.2, 0.7])) if stage else None
    n, max_shared = int(rng.integers(1, 6)), float(rng.choice([0.05, 0.3]))
    options = {"num_positives": n, "max_shared": max_shared, "min_side": 8}
    rules = [PoolRules(lists, labels, row, 8) for row in range(len(lists))]
    for sample in samples(lists, labels, 20 * len(lists), seed=seed, **options):
        own, target = rules[sample.query_row], sample.target
        own.assert_target(target)
        assert stage or target.is_query
        own.assert_examples(sample.positives, target, n, own=True)
        row = lists.lists[sample.query_row]
        valid = [i for i, r in enumerate(lists) if is_negative(row, r, max_shared)]
        if sample.negative_row is None:
            assert sample.negatives == ()
            away = own.key(target.place)
            assert all(away == rules[i].key(rules[i].query) for i in valid)
            assert all(away == rules[i].key(p) for i in valid for p in rules[i].places)
        else:
            assert sample.negative_row in valid
            other = rules[sample.negative_row]
            other.assert_examples(sample.negatives, target, n, own=False)
            assert all(own.key(p) != own.key(target.place) for p in sample.negatives)


LONG = [range(100 * i, 100 * i + 12) for i in range(4)]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_pure_function_of_seed_stage_and_number(stage):
    rng = np.random.default_rng(0)
    lists = random_rank_lists(rng)
    labels = random_labels(rng, lists) if stage else None
    expected = samples(lists, labels, 40)
    pool = SamplePool(lists, labels, seed=0)
    for number in np.random.default_rng(1).permutation(40).tolist() * 2:
        assert pool.sample(number) == expected[number]
    assert [s.number for s in expected] == list(range(40))
    assert samples(lists, labels, 40, seed=1) != expected


def test_stage_changes_every_draw():
    lists = listed(*LONG)
    sure = [(0.9,) * 12] * 4
    drawn = [samples(lists, labels_of(lists, *sure, stage=k), 200) for k in (1, 2)]
    assert [s.query_row for s in drawn[0]] != [s.query_row for s in drawn[1]]
    # A target by chance as before: one of 4 queries and the query itself or one of 12 images.
    same = sum(a.target == b.target for a, b in zip(*drawn))
    assert_binomial(same, 200, (1 / 6**2 + 12 * (5 / 6 / 12) ** 2) / 4)


@pytest.mark.parametrize("stage", [0, 1])
def test_every_query_once_an_epoch(stage):
    lists = listed(*[range(100 * i, 100 * i + 6) for i in range(7)], [])
    labels = labels_of(lists, *[(0.9,)] * 8) if stage else None
    pool = SamplePool(lists, labels, seed=3)
    assert len(pool) == 8
    epochs = [[pool.sample(8 * e + i).query_row for i in range(8)] for e in range(6)]
    assert all(sorted(rows) == list(range(8)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) > 1


def test_stage_0_learns_on_queries_with_examples_of_the_search():
    lists = listed(*LONG)
    drawn = samples(lists, None, 2000)
    counts = Counter()
    for sample in drawn:
        row = lists.lists[sample.query_row]
        assert sample.target.place == Place(True, row.image_id, QUERY_BOX)
        assert all(p == Place(False, p.image_id, BOX) for p in sample.positives)
        counts.update(p.image_id for p in sample.positives)
    # Each of the 48 images is among the 5 of 12 in a quarter of the samples.
    assert len(counts) == 48
    for hits in counts.values():
        assert_binomial(hits, 500, 5 / 12)


def test_five_of_six_targets_are_swapped_and_the_query_takes_their_place():
    lists = listed(range(12))
    labels = labels_of(lists, (0.9,) * 4 + (0.8,) * 4)
    counts = Counter()
    for sample in samples(lists, labels, 6000):
        images = {p.image_id for p in sample.positives}
        counts[sample.target.image_id] += 1
        assert len(images) == 5 and sample.target.image_id not in images
        assert images <= {*range(8), 1000}
        assert (1000 in images) == (not sample.target.is_query)
        assert (
            sample.target.weight
            == {True: 1, False: 0.9 if sample.target.image_id < 4 else 0.8}[sample.target.is_query]
        )
    assert sorted(counts) == [*range(8), 1000]
    assert_binomial(6000 - counts[1000], 6000, 5 / 6)
    for image in range(8):
        assert_binomial(counts[image], 6000, 5 / 6 / 8)


def test_all_confident_boxes_are_targets_and_the_best_is_the_example():
    lists = listed(range(2))
    boxes = tuple(
        ScoredBox((x, 0.0, x + 9, 9.0), score) for x, score in [(1.0, 0.9), (2.0, 0.7), (3.0, 0.5)]
    )
    labels = PseudoLabels(1, 0.5, lists.sha256, ((boxes, ()),))
    targets = set()
    for sample in samples(lists, labels, 40):
        targets.add(sample.target)
        if sample.target.is_query:
            assert set(sample.positives) == {Place(False, 0, (1.0, 0.0, 10.0, 9.0))}
        else:
            assert sample.target.boxes == ((1.0, 0.0, 10.0, 9.0), (2.0, 0.0, 11.0, 9.0))
            assert sample.target.weight == pytest.approx(0.8)
            assert set(sample.positives) == {Place(True, 1000, QUERY_BOX)}
    assert len(targets) == 2


def test_few_confident_images_are_drawn_with_replacement():
    lists = listed(range(12))
    labels = labels_of(lists, (0.9, 0.8))
    queries = 0
    seen = {0: Counter(), 1: Counter(), 1000: Counter()}
    for sample in samples(lists, labels, 3000):
        queries += sample.target.is_query
        assert len(sample.positives) == 5
        seen[sample.target.image_id].update(p.image_id for p in sample.positives)
    assert_binomial(queries, 3000, 1 / 3)
    for image, counts in seen.items():
        assert set(counts) == seen.keys() - {image}
        for hits in counts.values():
            assert_binomial(hits, sum(counts.values()), 1 / 2)


def test_without_confident_images_it_is_as_in_stage_0():
    lists = listed(range(12), range(100, 112))
    labels = labels_of(lists, (), (0.9,) * 6)
    for sample in samples(lists, labels, 60):
        if sample.query_row == 0:
            assert sample.target.place == Place(True, 1000, QUERY_BOX) and sample.target.weight == 1
            assert {p.box for p in sample.positives} == {BOX}
            assert len({p.image_id for p in sample.positives} & set(range(12))) == 5
            assert {p.box for p in sample.negatives} <= {(90.0, 0.0, 120.0, 30.0)}
        else:
            assert {p.box for p in sample.negatives} == {BOX}


def test_short_and_empty_lists():
    lists = listed(range(2), [], range(100, 112))
    positives, negatives = {}, {}
    for sample in samples(lists, None, 300):
        assert len(sample.positives) == len(sample.negatives) == 5
        positives.setdefault(sample.query_row, set()).update(sample.positives)
        negatives.setdefault(sample.negative_row, set()).update(sample.negatives)
    found = {Place(False, 0, BOX), Place(False, 1, BOX)}
    own = [Place(True, 1000 + i, QUERY_BOX) for i in range(3)]
    # The query that is learned on is its own example only where there is no other.
    assert positives[0] == found and positives[1] == {own[1]}
    assert negatives[0] == {*found, own[0]} and negatives[1] == {own[1]}
    assert own[2] not in positives[2] | negatives[2] and len(negatives[2]) == 12


@pytest.mark.parametrize("one_set", [True, False])
def test_own_image_of_a_query_is_no_candidate_of_one_data_set(one_set):
    lists = listed(range(6), query_images=[3], one_set=one_set)
    for labels in (None, labels_of(lists, (0.9,) * 6)):
        targets, places = set(), set()
        for sample in samples(lists, labels, 200):
            targets.add((sample.target.is_query, sample.target.image_id))
            places |= {(p.is_query, p.image_id) for p in sample.positives}
        assert ((False, 3) in places) == (not one_set)
        assert (labels is not None and not one_set) == ((False, 3) in targets)
        assert (True, 3) in targets


def test_small_boxes_are_left_out_and_counted(caplog):
    lists = listed(range(8))
    row = lists.lists[0]
    sizes = [(20, 20), (7.9, 20), (20, 7.9), (8, 8), *[(20, 20)] * 4]
    candidates = tuple(
        replace(candidate, box=(1.0, 1.0, 1.0 + width, 1.0 + height))
        for candidate, (width, height) in zip(row.candidates, sizes)
    )
    lists = replace(lists, lists=(replace(row, candidates=candidates),))
    with caplog.at_level(logging.WARNING):
        drawn = samples(lists, None, 100)
    assert {p.image_id for s in drawn for p in s.positives} == {0, 3, 4, 5, 6, 7}
    assert caplog.text.count("2 boxes of candidates have a side below 8 pixels") == 1
    caplog.clear()
    drawn = samples(lists, None, 100, min_side=7)
    assert {p.image_id for s in drawn for p in s.positives} == set(range(8))
    assert "boxes of candidates" not in caplog.text


def test_small_confident_boxes_are_left_out_and_counted(caplog):
    """The next box is the best one then, and an image without any is not used."""
    lists = listed(range(8))
    low, slim = (0.0, 0.0, 9.0, 7.0), (0.0, 0.0, 7.0, 9.0)
    large = (0.0, 0.0, 9.0, 9.0)
    found = ((ScoredBox(slim, 0.9), ScoredBox(large, 0.7)), (ScoredBox(low, 0.9),), *[()] * 6)
    drawn = samples(lists, PseudoLabels(1, 0.5, lists.sha256, (found,)), 100)
    targets = {s.target for s in drawn if not s.target.is_query}
    assert {(t.image_id, t.boxes, t.weight) for t in targets} == {(0, (large,), 0.7)}
    places = {p for s in drawn for p in s.positives}
    assert places == {Place(True, 1000, QUERY_BOX), Place(False, 0, large)}
    assert "2 boxes of candidates" in caplog.text


def test_small_box_of_a_query_is_named():
    lists = listed(range(8), range(8))
    small = replace(lists.lists[1], box=(0.0, 0.0, 7.5, 30.0))
    with pytest.raises(ValueError, match=r"query 71: .* at least 8.0 pixels, got \[0.0, 0.0, 7.5"):
        SamplePool(replace(lists, lists=(lists.lists[0], small)), None, seed=0)


def test_other_query_is_uniform_over_the_valid_ones():
    """Row 1 has the label of row 0, row 2 shares two of its twenty images, row 3 one, row 4 has no images."""
    images = [range(20), range(100, 120), [0, 1, *range(200, 218)], [0, *range(300, 319)], []]
    lists = listed(*images, range(500, 520), labels=[0, 0, 2, 3, 4, 5])
    counts = Counter(s.negative_row for s in samples(lists, None, 6 * 3000) if s.query_row == 0)
    assert sorted(counts) == [3, 4, 5]
    for hits in counts.values():
        assert_binomial(hits, 3000, 1 / 3)
    counts = {s.negative_row for s in samples(lists, None, 600, max_shared=0.1) if s.query_row == 0}
    assert counts == {2, 3, 4, 5}


def test_share_is_of_the_shorter_list():
    lists = listed(range(40), [0, *range(100, 109)])
    assert {s.negative_row for s in samples(lists, None, 4, max_shared=0.09)} == {None}
    assert {s.negative_row for s in samples(lists, None, 4, max_shared=0.1)} == {0, 1}


def test_negatives_are_uniform_and_without_replacement():
    lists = listed(range(5), range(100, 112))
    counts = Counter()
    for sample in samples(lists, None, 2000):
        if sample.query_row == 0:
            assert len(set(sample.negatives)) == 5
            counts.update(p.image_id for p in sample.negatives)
    assert sorted(counts) == list(range(100, 112))
    for hits in counts.values():
        assert_binomial(hits, 1000, 5 / 12)


def test_queries_without_any_other_go_without_negatives(caplog):
    lists = listed(range(8), range(100, 108), range(200, 208), labels=[0, 0, 0])
    with caplog.at_level(logging.WARNING):
        drawn = samples(lists, None, 30)
    assert all((s.negatives, s.negative_row) == ((), None) for s in drawn)
    assert caplog.text.count("3 of 3 queries have no other query") == 1
    caplog.clear()
    lists = listed(range(8), range(8), range(200, 208))
    drawn = samples(lists, None, 30, max_shared=0.0)
    assert all(s.negatives for s in drawn) and not caplog.text


def test_negatives_never_come_from_the_image_that_is_learned_on():
    # Query 0 is in image 50, which is all that was found for query 1 and one of what was found for query 2.
    lists = listed(range(8), [50], range(45, 53), query_images=[50, 1001, 1002])
    negatives = {}
    for sample in samples(lists, None, 600, max_shared=1.0):
        if sample.query_row == 0:
            negatives.setdefault(sample.negative_row, set()).update(sample.negatives)
    assert negatives[1] == {Place(True, 1001, QUERY_BOX)}
    assert {p.image_id for p in negatives[2]} == set(range(45, 53)) - {50}
    # In another data set, an image of the same number is another image.
    other = replace(lists, query_dataset="queries")
    drawn = [s for s in samples(other, None, 600, max_shared=1.0) if s.query_row == 0]
    assert 50 in {p.image_id for s in drawn if s.negative_row == 2 for p in s.negatives}


def test_other_objects_of_the_same_image_are_no_negatives():
    """Two queries of one image: the one would teach that the other, which is there, is not."""
    lists = listed(range(8), [], query_images=[50, 50])
    drawn = [s for s in samples(lists, None, 20) if s.query_row == 0]
    assert drawn and all((s.negatives, s.negative_row) == ((), None) for s in drawn)
    lists = listed(range(8), [], range(100, 108), query_images=[50, 50, 1002])
    assert {s.negative_row for s in samples(lists, None, 60) if s.query_row == 0} == {2}


def test_labels_of_other_lists_and_bad_options_are_refused():
    lists = listed(*LONG)
    with pytest.raises(ValueError, match="made for other rank lists"):
        SamplePool(listed(*LONG[1:]), labels_of(lists, *[()] * 4), seed=0)
    for options in ({"num_positives": 0}, {"seed": -1}, {"max_shared": 1.1}, {"max_shared": -0.1}):
        with pytest.raises(
            ValueError, match="num_positives must be at least 1, seed at least 0 and"
        ):
            samples(lists, None, 1, **options)
