"""Every command in docs/ runs, and every file in it is used, on tiny inputs in an empty folder."""

import pickle
import re
import runpy
import shlex
import shutil
import sys

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from factories import ROOT, TINY, TINY_OVERRIDES, tiny_model, write_set
from inference_cases import write_model, write_photos
from torchvision.models import mobilenet_v2

from fewshot_d2.cli.main import main

# Instance search takes hours; tests/test_make_rank_lists.py, test_self_paced.py and test_instance_search_docs.py
# run its tools and its code.
PAGES = [p for p in sorted((ROOT / "docs").glob("*.md")) if p.stem != "instance_search"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A paper's model and its data are replaced; everything else runs as it is written.
TINY_RUN = [
    *TINY_OVERRIDES,
    *("SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 1, "FEWSHOT.TEST.NUM_RUNS", 1),
    *(
        "FEWSHOT.TEST.MAX_IMAGES",
        2,
        "FEWSHOT.REGISTER",
        "[['mine','mine/annotations.json','mine/images']]",
    ),
    *(
        "DATASETS.TRAIN",
        "('mine',)",
        "DATASETS.TEST",
        "('mine',)",
        "FEWSHOT.TEST.SIDES",
        "('base',)",
    ),
    *("FEWSHOT.SUPPORT.DATASET_TRAIN", "", "FEWSHOT.SUPPORT.DATASETS_TEST", "()", "VIS_PERIOD", 0),
]


def blocks(page):
    return BLOCK.findall(page.read_text())


def commands_of(text):
    return [line for line in text.splitlines() if line.strip()]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder as the pages expect it: photos, models, the demo's output, a data set, weights, configs and tools."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_photos(tmp_path / "photos", 2)
    for name in ("cup", "cup_2", "fork"):
        shutil.move(write_photos(tmp_path / "made", 1)[0], tmp_path / f"{name}.jpg")
    (tmp_path / "output/demo").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "output/demo"):
        write_model(folder)
    (tmp_path / "mine/images").mkdir(parents=True)
    write_set(tmp_path / "mine/images", num_images=8)
    shutil.move("mine/images/instances.json", "mine/annotations.json")
    write_weights(tmp_path)
    for name in ("configs", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.syspath_prepend(ROOT / "tools")
    runpy.run_path("tools/make_example.py")["make_example"](tmp_path / "output/demo/example", 1)
    yield tmp_path
    forget_data_set()
    META_ARCH_REGISTRY._obj_map.pop("SimilarCells", None)


def write_weights(folder):
    """Random weights: of torchvision's MobileNetV2, and of the tiny model's backbone as a model zoo has them."""
    (folder / "weights").mkdir()
    torch.save(mobilenet_v2(weights=None).state_dict(), folder / "weights/mobilenet_v2.pth")
    state = tiny_model().backbone.bottom_up.state_dict()
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    (folder / "R-50.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "test"}))


def forget_data_set():
    DatasetCatalog.pop("mine", None)
    MetadataCatalog.pop("mine", None)


def run(command, monkeypatch):
    words = shlex.split(command)
    if words[0] == "fewshot-d2":
        # An example that is no good is a right answer of a random model.
        assert main(words[1:]) in ((0, 1) if words[1] == "check" else (0,)), command
        return
    assert words[0] == "python" and words[1].endswith(".py"), command
    # Each command is a process of its own.
    forget_data_set()
    extra = list(map(str, TINY_RUN)) if words[1] == "tools/train_net.py" else []
    monkeypatch.setattr(sys, "argv", [*words[1:], *extra])
    runpy.run_path(words[1], run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_run_as_they_are_written(page, workplace, monkeypatch, capsys):
    ran = 0
    for language, text in blocks(page):
        name = re.match(r"# file: (\S+)\n", text)
        if language == "sh":
            for command in commands_of(text):
                run(command, monkeypatch)
                ran += 1
        else:
            assert name, f"a block of {language} must begin with the name of its file"
            base = "configs/siamese_mask_rcnn/small_coco_s1.yaml"
            (workplace / name.group(1)).write_text(text.replace(base, str(TINY)))
    assert ran
    if page.stem == "own_photos":
        assert {p.name for p in (workplace / "found").iterdir()} >= {"results.json", "counts.csv"}
        assert (workplace / "kitchen.png").stat().st_size > 1000
        assert "dinner fork" in capsys.readouterr().out


def test_every_file_in_the_pages_is_used():
    for page in PAGES:
        commands = "\n".join(text for language, text in blocks(page) if language == "sh")
        for language, text in blocks(page):
            if language != "sh":
                assert text.partition("# file: ")[2].partition("\n")[0] in commands
