"""The detectron2 installer, without a network and without touching the installed detectron2."""

import importlib.machinery
import importlib.util
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = {
    "detectron2/__init__.py": b'__version__ = "0.6"\n',
    "detectron2/layers.py": b"from detectron2 import _C\n\n\ndef iou():\n    return _C.box_iou()\n",
    "detectron2/masks.py": b"import numpy as np\n\nDTYPES = [np.bool, np.int, np.bool_]\n",
    "detectron2/projects/__init__.py": b"",
    "projects/DeepLab/deeplab/__init__.py": b"",
    "tools/train_net.py": b"",
    "LICENSE": b"Apache License\n",
}


@pytest.fixture(scope="module")
def installer():
    path = ROOT / "tools" / "install_detectron2.py"
    spec = importlib.util.spec_from_file_location("install_detectron2", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def edits(installer):
    return (
        installer.Edit("detectron2/layers.py", installer._IMPORT_C, installer._OPTIONAL_C),
        installer.Edit("detectron2/masks.py", installer._ALIAS, r"\1", 2),
    )


@pytest.fixture
def sdist(tmp_path):
    """A small source package laid out like the real one."""
    for name, content in PACKAGE.items():
        path = tmp_path / "pkg-0.6" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with tarfile.open(tmp_path / "pkg.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "pkg-0.6", arcname="pkg-0.6")
    return tmp_path / "pkg.tar.gz"


class FakePip:
    """Replaces subprocess.run: records the commands, answers each from a list of outcomes."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)
        self.calls = []

    def __call__(self, command, **options):
        self.calls.append((command, options))
        status, text = self.outcomes.pop(0)
        return subprocess.CompletedProcess(command, status, stdout="", stderr=text)


def run_python(code, folder):
    """Run code in a fresh interpreter that sees ``folder`` before every installed package."""
    lines = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    result = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def pretend_spec(monkeypatch, installer, **specs):
    """Let the installer see these modules (a spec or None); the others as they are."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        installer.importlib.util,
        "find_spec",
        lambda name: specs[name] if name in specs else real(name),
    )


def test_existing_detectron2_is_left_alone(installer, monkeypatch, tmp_path, capsys):
    (tmp_path / "detectron2").mkdir()
    package = tmp_path / "detectron2" / "__init__.py"
    package.write_text("raise SystemExit('imported')\n")  # finding it must not import it
    spec = importlib.util.spec_from_file_location("detectron2", package)
    pretend_spec(monkeypatch, installer, detectron2=spec)
    monkeypatch.setattr(installer.subprocess, "run", FakePip())
    assert installer.main([]) == 0
    assert f"already importable from {package.parent}: nothing to do" in capsys.readouterr().out


def test_folder_of_that_name_is_not_a_detectron2(installer, monkeypatch):
    namespace = importlib.machinery.ModuleSpec("detectron2", loader=None, is_package=True)
    pretend_spec(monkeypatch, installer, detectron2=namespace)
    assert installer.find_detectron2() is None


def test_wrong_hash_names_file_and_both_hashes(installer, sdist, tmp_path, capsys):
    folder = tmp_path / "wheels"
    assert installer.main(["--sdist", str(sdist), "--wheel-dir", str(folder)]) == 1
    message = capsys.readouterr().err
    got = installer.hashlib.sha256(sdist.read_bytes()).hexdigest()
    assert str(sdist) in message and installer.SDIST_SHA256 in message and got in message
    assert not folder.exists()


def test_missing_sdist_is_named(installer, tmp_path):
    with pytest.raises(installer.InstallError, match="must be a file, got .*absent.tar.gz"):
        installer.check_hash(tmp_path / "absent.tar.gz")


@pytest.mark.parametrize("content", [b"nothing to edit\n", b"from detectron2 import _C\n" * 2])
def test_edit_that_does_not_fit_names_the_file(installer, edits, content):
    files = {"detectron2/layers.py": content}
    with pytest.raises(installer.InstallError, match=r"detectron2/layers\.py.* 1 times, got [02]"):
        installer.apply_edits(files, edits[:1])


def test_edit_of_an_absent_file_names_it(installer, edits):
    with pytest.raises(installer.InstallError, match=r"detectron2/layers\.py must be in"):
        installer.apply_edits({}, edits[:1])


def test_apply_edits_does_not_change_its_input(installer, edits):
    before = dict(PACKAGE)
    installer.apply_edits(before, edits)
    assert before == PACKAGE


def test_edited_package_imports_and_fails_only_on_use(installer, edits, sdist, tmp_path):
    files = installer.apply_edits(installer.read_sdist(sdist), edits)
    wheel = installer.write_wheel(files, tmp_path / "wheels")
    code = """
import importlib.metadata, detectron2.layers, detectron2.masks, detectron2.projects.deeplab
import numpy as np
assert detectron2.masks.DTYPES == [bool, int, np.bool_]
print(importlib.metadata.version("detectron2"))
try:
    detectron2.layers.iou()
except RuntimeError as error:
    print(error)
"""
    version, error = run_python(code, wheel).splitlines()
    assert version == "0.6+py"
    assert error.startswith("box_iou needs detectron2's compiled extension")
    assert installer.OFFICIAL_BUILD in error


def test_every_edit_of_the_table_gives_python(installer):
    sources = {
        installer._ALIAS: "x = np.bool\n",
        installer._IMPORT_C: "from detectron2 import _C\n",
    }
    for edit in installer.EDITS:
        if edit.old in sources:
            files = {edit.file: (sources[edit.old] * edit.count).encode()}
            edited = installer.apply_edits(files, [edit])[edit.file].decode()
            compile(edited, edit.file, "exec")
            assert edited.startswith(installer.STAMP)
    compile(installer.NO_EXTENSION, "_no_extension.py", "exec")


def test_wheel_is_reproducible_and_complete(installer, edits, sdist, tmp_path):
    files = installer.apply_edits(installer.read_sdist(sdist), edits)
    first = installer.write_wheel(files, tmp_path / "a")
    second = installer.write_wheel(files, tmp_path / "b")
    assert first.name == "detectron2-0.6+py-py3-none-any.whl"
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        names = set(archive.namelist())
        record = archive.read("detectron2-0.6+py.dist-info/RECORD").decode()
    assert {line.split(",")[0] for line in record.splitlines()} == names
    assert "detectron2/_no_extension.py" in names
    assert "detectron2-0.6+py.dist-info/LICENSE" in names
    assert not any(name.startswith(("tools/", "projects/")) for name in names)


def test_unreachable_index_says_what_to_do(installer, monkeypatch, tmp_path, capsys):
    pip = FakePip((1, "ERROR: No matching distribution found for pb1-detectron2==0.6"))
    monkeypatch.setattr(installer.subprocess, "run", pip)
    assert installer.main(["--wheel-dir", str(tmp_path / "wheels")]) == 1
    message = capsys.readouterr().err
    for part in ("pip download --no-deps", "No matching distribution", "index must be reachable"):
        assert part in message
    assert "PIP_FIND_LINKS" in message and "--sdist FILE" in message
    assert len(pip.calls) == 1


def test_failing_installation_says_what_to_do(installer, monkeypatch, tmp_path):
    monkeypatch.setattr(installer.subprocess, "run", FakePip((1, "ERROR: no network")))
    with pytest.raises(installer.InstallError, match="(?s)no network.*PIP_FIND_LINKS"):
        installer.install_wheel(tmp_path / "detectron2.whl")


def test_too_new_pip_is_replaced_for_the_download_only(installer, monkeypatch, tmp_path):
    refusal = "ERROR: Distributions from PyPI cannot declare direct URL dependencies."
    pip = FakePip((1, refusal), (0, ""), (0, ""))
    monkeypatch.setattr(installer.subprocess, "run", pip)
    installer.download_with_fitting_pip(["download", "x"], tmp_path)
    (first, _), (fetch_pip, _), (second, options) = pip.calls
    assert first == second
    assert fetch_pip[-3:] == ["--target", str(tmp_path / "pip"), installer.OLD_PIP]
    assert options["env"]["PYTHONPATH"] == str(tmp_path / "pip")
    assert installer.OLD_PIP in (ROOT / "constraints.txt").read_text().splitlines()


def test_torch_must_be_there_before_the_download(installer, monkeypatch, tmp_path):
    pretend_spec(monkeypatch, installer, torch=None)
    monkeypatch.setattr(installer.subprocess, "run", FakePip())
    with pytest.raises(installer.InstallError, match="torch must be installed"):
        installer.download_sdist(tmp_path)
