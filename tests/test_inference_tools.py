"""The fuzzing and the benchmark of find, in small."""

import runpy
import sys

import pytest
from factories import ROOT, TINY_OVERRIDES


def run_tool(name, arguments, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(ROOT / "tools" / name))["main"]()


def test_no_input_breaks_anything(monkeypatch, capsys):
    assert run_tool("fuzz_inputs.py", ["--cases", 150, "--finds", 1, "--seed", 1], monkeypatch) == 0
    assert "150 cases, seed 1, 0 failures" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "message"), [([], "ratio"), (["--memory"], "for 9 pictures")])
def test_benchmark_of_find(monkeypatch, capsys, option, message):
    arguments = ["--config-file", ROOT / "configs/siamese_mask_rcnn/demo.yaml", "--images", 10]
    arguments += ["--rounds", 1, "--size", 40, 50, *option, *TINY_OVERRIDES]
    run_tool("benchmark_find.py", arguments, monkeypatch)
    assert message in capsys.readouterr().out
