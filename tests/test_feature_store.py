"""Features in a support-set file are used if, and only if, model and examples are the same."""

import json
import zipfile

import pytest
import torch
from factories import random_support, random_support_set, tiny_config

from fewshot_d2 import FewShotPredictor, SupportSet, support_files
from fewshot_d2.inference.feature_store import (
    examples_sha256,
    load_features,
    model_sha256,
    save_keeping_features,
)
from fewshot_d2.support_files import read_archive, read_features, write_archive


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    return FewShotPredictor(tiny_config())


def test_stored_features_are_used_and_equal(predictor, rng, tmp_path, monkeypatch):
    path, support_set = tmp_path / "set.zip", random_support_set(rng)
    predictor.save_support(path, support_set)
    expected = predictor.support
    monkeypatch.setattr(predictor.model, "encode_support", lambda _: pytest.fail("encoded again"))
    found = predictor.set_support(path)
    assert found.class_names == support_set.class_names and found.system == expected.system
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor)
    # Names are no part of the features.
    renamed = SupportSet([1, 2], ["x", "y"], support_set.examples)
    save_keeping_features(path, renamed)
    assert predictor.set_support(path).class_names == ["x", "y"]


def test_other_examples_or_another_model_are_encoded_anew(predictor, rng, tmp_path):
    path, support_set = tmp_path / "set.zip", random_support_set(rng)
    predictor.save_support(path, support_set)
    assert load_features(path, support_set, predictor.sha256) is not None
    assert load_features(path, support_set, "other") is None
    assert load_features(path, random_support_set(rng), predictor.sha256) is None
    more = SupportSet([1], ["a"], [[random_support(rng)]])
    save_keeping_features(path, more)
    assert read_features(path) == {} and len(SupportSet.load(path)) == 1


def test_hash_of_a_model_knows_weights_and_settings_and_nothing_else(predictor):
    cfg = predictor.cfg
    first = model_sha256(predictor.model, cfg)
    assert first == model_sha256(predictor.model, cfg)
    elsewhere = cfg.clone()
    elsewhere.MODEL.WEIGHTS, elsewhere.MODEL.DEVICE, elsewhere.OUTPUT_DIR = "x.pth", "cuda", "y"
    elsewhere.MODEL.TORCHVISION.WEIGHTS = elsewhere.MODEL.TIMM.WEIGHTS = "z.pth"
    assert model_sha256(predictor.model, elsewhere) == first
    for key, value in (
        ("FEWSHOT.SUPPORT.SIZE", 64),
        ("FEWSHOT.RESIZE_RULE", "code"),
        ("INPUT.FORMAT", "BGR"),
        ("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]),
    ):
        other = cfg.clone()
        other.merge_from_list([key, value])
        assert model_sha256(predictor.model, other) != first, key
    weight = next(predictor.model.parameters())
    with torch.no_grad():
        weight.view(-1)[0] += 1e-6
        changed = model_sha256(predictor.model, cfg)
        weight.view(-1)[0] -= 1e-6
    assert changed != first


def test_hash_of_examples_sees_a_pixel_a_box_and_a_flag(rng):
    support_set = random_support_set(rng)
    hashes = {examples_sha256(support_set)}
    shot = support_set.examples[0][0]
    shot.image[0, 0, 0] ^= 1
    hashes.add(examples_sha256(support_set))
    shot.box = torch.tensor([0.0, 0, 5, 5])
    hashes.add(examples_sha256(support_set))
    shot.negative = True
    hashes.add(examples_sha256(support_set))
    assert len(hashes) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_all_kinds_survive(rng, tmp_path, dtype):
    rows = random_support_set(rng).rows()
    tensors = {"a": torch.randint(0, 2, (2, 3, 4), generator=rng).to(dtype), "e": torch.zeros(2, 0)}
    write_archive(tmp_path / "a.zip", rows, {"m": {"tensors": tensors, "system": "S"}})
    entry = read_features(tmp_path / "a.zip")["m"]
    assert entry["system"] == "S" and entry["tensors"]["a"].dtype == dtype
    assert torch.equal(entry["tensors"]["a"], tensors["a"])
    assert entry["tensors"]["e"].shape == (2, 0)
    assert len(read_archive(tmp_path / "a.zip")) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shape", [3, 3]),
        ("shape", [-1, 4]),
        ("shape", [2**40, 2**40]),
        ("dtype", "save"),
        ("member", "x"),
    ],
)
def test_features_that_lie_about_themselves_are_refused(rng, tmp_path, key, value):
    path = tmp_path / "a.zip"
    write_archive(path, random_support_set(rng).rows(), {"m": {"tensors": {"a": torch.ones(2, 4)}}})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    index = json.loads(members["features.json"])
    index["m"]["tensors"]["a"][key] = value
    members["features.json"] = json.dumps(index).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="a.zip must be a support-set file"):
        read_features(path)


def test_features_of_another_file_are_copied_and_not_computed(
    predictor, rng, tmp_path, monkeypatch
):
    support_set = random_support_set(rng)
    predictor.save_support(tmp_path / "old.zip", support_set)
    monkeypatch.setattr(predictor.model, "encode_support", lambda _: pytest.fail("encoded again"))
    predictor.save_support(tmp_path / "new.zip", support_set, stored_in=[tmp_path / "old.zip"])
    assert load_features(tmp_path / "new.zip", support_set, predictor.sha256) is not None


@pytest.mark.parametrize("tensor", [torch.ones(3, 4), torch.tensor(1.0)])
def test_features_that_do_not_fit_the_classes_name_their_file(rng, tmp_path, tensor):
    path, support_set = tmp_path / "a.zip", random_support_set(rng)
    entry = {"tensors": {"a": tensor}, "examples_sha256": examples_sha256(support_set)}
    write_archive(path, support_set.rows(), {"m": entry})
    with pytest.raises(ValueError, match="a.zip must be a support-set file"):
        load_features(path, support_set, "m")


def test_many_tensors_of_one_member_are_refused_unread(rng, tmp_path, monkeypatch):
    path = tmp_path / "a.zip"
    entries = {f"m{i}": {"tensors": {"a": torch.ones(2, 50)}} for i in range(5)}
    write_archive(path, random_support_set(rng).rows(), entries)
    monkeypatch.setattr(support_files, "_MAX_FEATURE_BYTES", 1000)
    with pytest.raises(ValueError, match="a.zip .*features must be at most 1000 bytes, got 2000"):
        read_features(path)
    # Those of one model are few enough.
    assert list(read_features(path, "m3")) == ["m3"]


def test_what_could_not_be_read_is_not_written(rng, tmp_path, monkeypatch):
    support_set = random_support_set(rng)
    monkeypatch.setattr(support_files, "_MAX_PIXELS_IN_ALL", 2 * 30 * 24)
    support_set.save(tmp_path / "a.zip")
    assert len(SupportSet.load(tmp_path / "a.zip")) == 2
    support_set.examples[0][0].mask = torch.ones(30, 24, dtype=torch.bool)
    with pytest.raises(ValueError, match="pixels in all .* for .*b.zip"):
        support_set.save(tmp_path / "b.zip")
    assert not (tmp_path / "b.zip").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_is_refused(rng, tmp_path, method):
    random_support_set(rng).save(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "b.zip", "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(
        ValueError, match=f"b.zip .* must be stored or deflated, got method {method}"
    ):
        SupportSet.load(tmp_path / "b.zip")
