"""Checkpoints: atomic, safe, of the right system."""

import errno
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from fewshot_d2 import files
from fewshot_d2.checkpoint import FewShotCheckpointer, read_checkpoint


class Small(nn.Linear):
    def __init__(self):
        super().__init__(2, 3)


class Other(nn.Linear):
    def __init__(self):
        super().__init__(2, 3)


def test_round_trip(tmp_path):
    model = Small()
    FewShotCheckpointer(model, str(tmp_path)).save("model_1", iteration=5)
    again = Small()
    rest = FewShotCheckpointer(again, str(tmp_path)).resume_or_load("", resume=True)
    assert rest["iteration"] == 5
    assert torch.equal(again.weight, model.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_1.pth"]


def test_checkpoint_of_another_system_is_refused(tmp_path):
    FewShotCheckpointer(Other(), str(tmp_path)).save("model")
    with pytest.raises(
        ValueError, match="model.pth must be a checkpoint of Small, got one of Other"
    ):
        FewShotCheckpointer(Small()).load(str(tmp_path / "model.pth"))


def test_weights_without_one_common_name_are_refused(tmp_path):
    torch.save({"foreign.weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match="foreign.pth must hold weights of Small"):
        FewShotCheckpointer(Small()).load(str(tmp_path / "foreign.pth"))


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04broken"])
def test_broken_file_is_named(tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(ValueError, match="bad.pth must be a readable checkpoint"):
        FewShotCheckpointer(Small()).load(str(tmp_path / "bad.pth"))


@pytest.mark.parametrize("is_zip", [True, False])
def test_lazy_content_is_the_same_in_both_formats(tmp_path, is_zip):
    content = {"model": {"w": torch.arange(6.0)}, "iteration": 4}
    path = str(tmp_path / "x.pth")
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    for lazy in (False, True):
        read = read_checkpoint(path, lazy=lazy)
        assert read["iteration"] == 4 and torch.equal(read["model"]["w"], torch.arange(6.0))


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("name", ["evil.pth", "evil.pkl"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, name, capsys):
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save({"model": Evil()}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises(ValueError, match=name):
        FewShotCheckpointer(Small()).load(str(path))
    assert capsys.readouterr().out == ""


def test_model_zoo_pickle_of_arrays_loads(tmp_path):
    weights = {"weight": np.full((3, 2), 2.0, np.float32), "bias": np.zeros(3, np.float32)}
    content = {"model": weights, "__author__": "zoo"}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(content))
    model = Small()
    FewShotCheckpointer(model).load(str(tmp_path / "zoo.pkl"))
    assert (model.weight == 2).all()


def test_checkpoint_of_another_width_is_refused(tmp_path):
    wide = Small()
    wide.weight = nn.Parameter(torch.zeros(3, 7))
    FewShotCheckpointer(wide, str(tmp_path)).save("wide")
    with pytest.raises(ValueError, match="wide.pth must fit the config's Small"):
        FewShotCheckpointer(Small()).load(str(tmp_path / "wide.pth"))


@pytest.mark.parametrize("wrapped", [False, True])
def test_full_disk_keeps_the_older_checkpoint(tmp_path, monkeypatch, wrapped):
    checkpointer = FewShotCheckpointer(Small(), str(tmp_path))
    checkpointer.save("model")
    before = (tmp_path / "model.pth").read_bytes()

    def full(content, file):
        file.write(b"half")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            if wrapped:
                raise RuntimeError("unexpected pos") from None
            raise

    monkeypatch.setattr(files.torch, "save", full)
    with pytest.raises(OSError, match="model.pth could not be written"):
        checkpointer.save("model")
    assert (tmp_path / "model.pth").read_bytes() == before
    assert (tmp_path / "last_checkpoint").read_text() == "model.pth"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model.pth"]
