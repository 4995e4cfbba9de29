"""Install detectron2 v0.6 as a pure-Python wheel, without a compiler.

detectron2 is not on PyPI under its own name. ``pb1-detectron2`` 0.6 on PyPI carries upstream's
v0.6 Python files, but not its C++ sources, and predates today's numpy, Pillow and setuptools. This
script fetches that source package, checks its SHA-256, applies the edits listed in ``EDITS`` and
installs the result as ``detectron2`` 0.6+py. ROIAlign and NMS are torchvision's compiled kernels;
only rotated boxes and deformable convolution on a GPU need the official build.
An importable detectron2 is never touched.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SDIST = "pb1-detectron2==0.6"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
OLD_PIP = "pip==26.2.1"
VERSION = "0.6+py"
OFFICIAL_BUILD = (
    "pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2.git"
)
REQUIREMENTS = (
    "numpy",
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5",
    "iopath>=0.1.7",
    "omegaconf>=2.1",
    "hydra-core>=1.1",
)
PROJECTS = {
    "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
    "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
    "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
}
STAMP = "# Modified by fewshot_d2's tools/install_detectron2.py to run without compiled code.\n"

NO_EXTENSION = '''"""Stands in for the compiled extension that this pure-Python build lacks."""

_MESSAGE = (
    "{} needs detectron2's compiled extension, which this pure-Python build (0.6+py) lacks. "
    "Deformable convolution and rotated boxes need the official build: " + OFFICIAL_BUILD
)


class _NoExtension:
    """Raises on the first use of any compiled function."""

    def __getattr__(self, name):
        raise RuntimeError(_MESSAGE.format(name))


_C = _NoExtension()


def check_operator(name):
    """Raise if torch has no operator ``detectron2::name``."""
    import torch

    if not hasattr(torch.ops.detectron2, name):
        raise RuntimeError(_MESSAGE.format(name))
'''.replace("OFFICIAL_BUILD", repr(OFFICIAL_BUILD))
NEW_FILES = {"detectron2/_no_extension.py": NO_EXTENSION}


class Edit(NamedTuple):
    """One replacement: regular expression ``old`` must match ``count`` times in ``file``."""

    file: str
    old: str
    new: str
    count: int = 1


_ALIAS = r"\bnp\.(bool|int|float|str|object)\b"
_IMPORT_C = r"(?m)^from detectron2 import _C$"
_OPTIONAL_C = (
    "try:\n    from detectron2 import _C\n"
    "except ImportError:\n    from detectron2._no_extension import _C"
)
EDITS = (
    # Aliases of Python types, removed in numpy 1.24.
    Edit("detectron2/evaluation/pascal_voc_evaluation.py", _ALIAS, r"\1", 2),
    Edit("detectron2/evaluation/sem_seg_evaluation.py", _ALIAS, r"\1", 7),
    Edit("detectron2/structures/masks.py", _ALIAS, r"\1", 3),
    Edit("detectron2/data/datasets/pascal_voc.py", _ALIAS, r"\1", 1),
    Edit("detectron2/data/build.py", _ALIAS, r"\1", 2),
    Edit("detectron2/utils/visualizer.py", _ALIAS, r"\1", 3),
    Edit("detectron2/utils/video_visualizer.py", _ALIAS, r"\1", 1),
    # numpy 2: copy=False means "fail if a copy is needed".
    Edit("detectron2/layers/mask_ops.py", r"np\.array\(mask, copy=False\)", "np.asarray(mask)"),
    # Removed in Pillow 10.
    Edit("detectron2/data/transforms/transform.py", r"\bImage\.LINEAR\b", "Image.BILINEAR"),
    # The compiled extension is optional, with a clear error on use.
    Edit("detectron2/layers/deform_conv.py", _IMPORT_C, _OPTIONAL_C),
    Edit("detectron2/layers/rotated_boxes.py", _IMPORT_C, _OPTIONAL_C),
    Edit("detectron2/layers/roi_align_rotated.py", _IMPORT_C, _OPTIONAL_C),
    Edit(
        "detectron2/layers/nms.py",
        r"(?m)^    return torch\.ops\.detectron2\.nms_rotated\(",
        "    from detectron2._no_extension import check_operator\n\n"
        '    check_operator("nms_rotated")\n'
        "    return torch.ops.detectron2.nms_rotated(",
    ),
    # As upstream main: without the extension, COCO evaluation is pycocotools' own.
    Edit(
        "detectron2/evaluation/coco_evaluation.py",
        r"(?m)^from detectron2\.evaluation\.fast_eval_api import COCOeval_opt\n",
        "",
    ),
    Edit(
        "detectron2/evaluation/coco_evaluation.py",
        r"(?m)^from \.evaluator import DatasetEvaluator\n",
        "from .evaluator import DatasetEvaluator\n\n"
        "try:\n    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "except ImportError:\n    COCOeval_opt = COCOeval\n",
    ),
    # setuptools dropped pkg_resources in version 82.
    Edit(
        "detectron2/model_zoo/model_zoo.py",
        r"(?m)^import pkg_resources\n",
        "from importlib.resources import files\n",
    ),
    Edit(
        "detectron2/model_zoo/model_zoo.py",
        r'pkg_resources\.resource_filename\(\n        "detectron2\.model_zoo", '
        r'os\.path\.join\("configs", config_path\)\n    \)',
        'os.path.join(str(files("detectron2.model_zoo")), "configs", config_path)',
    ),
)


class InstallError(RuntimeError):
    """A step failed in a way that the message explains."""


def find_detectron2() -> str | None:
    """Return the folder of an importable detectron2 (without importing it), or None."""
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:  # no origin: a folder of that name, not a package
        return None
    return str(Path(spec.origin).parent)


def run_pip(arguments: Sequence[str], python_path: Path | None = None) -> None:
    """Run pip of this interpreter; raise InstallError with its last lines if it fails."""
    command = [sys.executable, "-m", "pip", *arguments]
    environment = dict(os.environ)
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode == 0:
        return
    output = "\n".join((result.stdout + result.stderr).strip().splitlines()[-8:])
    raise InstallError(f"this command failed: {' '.join(command)}\n{output}")


def download_sdist(folder: Path) -> Path:
    """Fetch the source package from the package index into ``folder``; its setup needs torch."""
    for module in ("torch", "setuptools"):
        if importlib.util.find_spec(module) is None:
            raise InstallError(
                f"{module} must be installed in {sys.prefix} before detectron2, got none; "
                f"run: {sys.executable} -m pip install torch torchvision setuptools wheel"
            )
    # pip checks this hash before it runs the package's setup.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{SDIST} --hash=sha256:{SDIST_SHA256}\n")
    arguments = ["download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    arguments += ["--dest", str(folder), "--requirement", str(requirements)]
    try:
        download_with_fitting_pip(arguments, folder)
    except InstallError as error:
        raise InstallError(
            f"could not fetch {SDIST}: {error}\n"
            "The package index must be reachable and must serve this package. Without network: "
            "set PIP_NO_INDEX=1 and PIP_FIND_LINKS=FOLDER to a folder that holds it and its "
            "dependencies, or pass its .tar.gz with --sdist FILE."
        ) from error
    return next(folder.glob("pb1*detectron2-0.6.tar.gz"))


def download_with_fitting_pip(arguments: Sequence[str], folder: Path) -> None:
    """Run ``pip download``; where pip is too new for this package, with an older one.

    From 26.3 on, pip refuses a PyPI file that names a dependency by URL, even in an extra nobody
    asked for and with ``--no-deps``. This one does (panopticapi); that dependency is not fetched.
    """
    try:
        run_pip(arguments)
    except InstallError as error:
        if "cannot declare direct URL dependencies" not in str(error):
            raise
        print(f"This pip refuses the package for an unused extra; fetching it with {OLD_PIP}.")
        run_pip(["install", "--target", str(folder / "pip"), OLD_PIP])
        run_pip(arguments, python_path=folder / "pip")


def check_hash(path: Path, expected: str = SDIST_SHA256) -> None:
    """Raise unless the SHA-256 of the file is the expected one."""
    if not path.is_file():
        raise InstallError(f"the source package must be a file, got {path}")
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != expected:
        raise InstallError(f"SHA-256 of {path} must be {expected}, got {got}")


def read_sdist(path: Path) -> dict[str, bytes]:
    """Return the files of the package, keyed by their path in the wheel."""
    files = {}
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            name = member.name.partition("/")[2]
            for source, target in PROJECTS.items():
                name = name.replace(source, target, 1) if name.startswith(source) else name
            if member.isfile() and (name.startswith("detectron2/") or name == "LICENSE"):
                files[name] = archive.extractfile(member).read()
    return files


def apply_edits(files: dict[str, bytes], edits: Sequence[Edit] = EDITS) -> dict[str, bytes]:
    """Return a copy of the files with every edit made; raise if one does not fit."""
    edited = dict(files)
    for edit in edits:
        if edit.file not in edited:
            raise InstallError(f"{edit.file} must be in the source package, got no such file")
        text, count = re.subn(edit.old, edit.new, edited[edit.file].decode("utf-8"))
        if count != edit.count:
            raise InstallError(
                f"{edit.file}: the pattern {edit.old!r} must match {edit.count} times, got {count}"
            )
        edited[edit.file] = (text if text.startswith(STAMP) else STAMP + text).encode("utf-8")
    return edited


def wheel_metadata() -> dict[str, str]:
    """Return the dist-info files of the wheel, without RECORD."""
    lines = ["Metadata-Version: 2.1", "Name: detectron2", f"Version: {VERSION}"]
    lines += ["Summary: detectron2 v0.6, pure Python, edited to run on current libraries."]
    lines += ["Home-page: https://github.com/facebookresearch/detectron2"]
    lines += ["License: Apache-2.0", "Requires-Python: >=3.10"]
    lines += [f"Requires-Dist: {requirement}" for requirement in REQUIREMENTS]
    wheel = "Wheel-Version: 1.0\nGenerator: fewshot_d2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    return {"METADATA": "\n".join(lines) + "\n", "WHEEL": wheel, "top_level.txt": "detectron2\n"}


def write_wheel(files: dict[str, bytes], folder: Path) -> Path:
    """Write the files as a wheel into ``folder``; the same files give the same bytes."""
    info = f"detectron2-{VERSION}.dist-info"
    contents = {f"{info}/LICENSE" if name == "LICENSE" else name: files[name] for name in files}
    contents |= {name: text.encode() for name, text in NEW_FILES.items()}
    contents |= {f"{info}/{name}": text.encode() for name, text in wheel_metadata().items()}
    record = []
    for name, content in sorted(contents.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        record.append(f"{name},sha256={digest},{len(content)}\n")
    contents[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    temporary = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(contents.items()):
            entry = zipfile.ZipInfo(name)  # dated 1980: no time of day in the wheel
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, compress_type=zipfile.ZIP_DEFLATED)
    os.replace(temporary, wheel)
    return wheel


def build_wheel(sdist: Path | None, folder: Path) -> Path:
    """Fetch (unless ``sdist`` is given), check and edit the source; write the wheel."""
    with tempfile.TemporaryDirectory() as temporary:
        if sdist is None:
            print(f"Fetching {SDIST} ...")
            sdist = download_sdist(Path(temporary))
        check_hash(sdist)
        return write_wheel(apply_edits(read_sdist(sdist)), folder)


def install_wheel(wheel: Path) -> None:
    """Install the wheel and its run-time dependencies with pip."""
    print(f"Installing {wheel.name} and its dependencies ...")
    try:
        run_pip(["install", str(wheel)])
    except InstallError as error:
        raise InstallError(
            f"{error}\nThe dependencies must come from a reachable package index, "
            "or from a folder of wheels named by PIP_FIND_LINKS (with PIP_NO_INDEX=1)."
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, metavar="FILE", help=f"use this file of {SDIST}")
    parser.add_argument("--wheel-dir", type=Path, metavar="DIR", help="only write the wheel there")
    options = parser.parse_args(arguments)
    try:
        if options.wheel_dir is not None:
            print(f"Wrote {build_wheel(options.sdist, options.wheel_dir)}")
            return 0
        existing = find_detectron2()
        if existing is not None:
            print(f"detectron2 is already importable from {existing}: nothing to do.")
            return 0
        with tempfile.TemporaryDirectory() as temporary:
            install_wheel(build_wheel(options.sdist, Path(temporary)))
    except InstallError as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1
    print(f"Installed detectron2 {VERSION}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
