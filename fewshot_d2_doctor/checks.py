"""What the doctor looks at. Each check returns findings and raises nothing, however broken the installation is."""

import importlib
import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

OK, NOTE, BROKEN = "ok", "note", "BROKEN"

_UNKNOWN = "of unknown version"

_INSTALL_DETECTRON2 = "python tools/install_detectron2.py"
_REPLACE_DETECTRON2 = f"pip uninstall -y detectron2 && {_INSTALL_DETECTRON2}"
_REINSTALL_TORCH = "pip install --force-reinstall torch torchvision    # both, from one index"

# Known problems: module, what its error says (a regular expression), the fix. The first that fits counts.
KNOWN_PROBLEMS: tuple[tuple[str, str, str], ...] = (
    ("detectron2", r"No module named 'pkg_resources'", 'pip install "setuptools<81"'),
    ("detectron2", r"No module named 'detectron2'", _INSTALL_DETECTRON2),
    ("detectron2", r"has no attribute '(LINEAR|bool|int|float|object|str)'", _REPLACE_DETECTRON2),
    (
        "detectron2",
        r"undefined symbol|libcudart|libc10|_C",
        f"it was compiled for another torch: {_REPLACE_DETECTRON2}",
    ),
    ("torchvision", r"operator torchvision::|Couldn't load custom C\+\+ ops", _REINSTALL_TORCH),
    ("torchvision", r"No module named 'torchvision'", "pip install torch torchvision"),
    ("torch", r"No module named 'torch'", "pip install torch torchvision"),
    ("torch", r"libcud|libnv|libcublas", _REINSTALL_TORCH),
    (
        "cv2",
        r"libGL|libgthread|libxcb",
        "pip uninstall -y opencv-python && pip install --force-reinstall opencv-python-headless",
    ),
    ("cv2", r"numpy|_ARRAY_API", "pip install --upgrade --force-reinstall opencv-python-headless"),
    (
        "pycocotools",
        r"numpy\.dtype size changed|numpy",
        "pip install --force-reinstall --no-cache-dir pycocotools",
    ),
    ("fewshot_d2", r"No module named 'fewshot_d2'", "pip install --no-build-isolation -e ."),
    (
        "fewshot_d2",
        r"No module named 'fcntl'",
        "Windows itself is not supported: install it in WSL",
    ),
)


@dataclass(frozen=True)
class Finding:
    """One line: ``state`` is OK, NOTE (works, but worth knowing) or BROKEN; ``fix`` is a command, or ""."""

    state: str
    name: str
    detail: str
    fix: str = ""


def examine(*, all_data_sets: bool = False) -> list[Finding]:
    """All findings, what others depend on first."""
    findings = [Finding(OK, "python", ".".join(map(str, sys.version_info[:3])))]
    findings += [module_finding(name, probe) for name, probe in _MODULES.items()]
    findings += [*_opencv_twice(), *_gpu()]
    is_whole = all(finding.state != BROKEN for finding in findings)
    findings += _data_sets(all_data_sets) if is_whole else []
    return [*findings, _demo()]


def module_finding(name: str, probe: Callable[[ModuleType], str]) -> Finding:
    """Import a module and let ``probe`` try it and tell its version."""
    try:
        return Finding(OK, name, probe(importlib.import_module(name)))
    # A broken compiled module raises anything.
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return Finding(BROKEN, name, text.splitlines()[0], known_fix(name, text))


def known_fix(module: str, error: str) -> str:
    """The fix of a known problem; without one, to install the module again."""
    for of_module, pattern, fix in KNOWN_PROBLEMS:
        if of_module == module and re.search(pattern, error):
            return fix
    missing = re.search(r"No module named '([\w.]+)'", error)
    package = missing.group(1).partition(".")[0] if missing else module
    if package in ("detectron2", "fewshot_d2"):
        return known_fix(package, f"No module named '{package}'")
    return f"pip install --upgrade --force-reinstall {package}"


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return _UNKNOWN


def _probe_torchvision(torchvision: ModuleType) -> str:
    torch = importlib.import_module("torch")
    ops = importlib.import_module("torchvision.ops")
    ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    return f"{torchvision.__version__}, its operators work"


def _probe_detectron2(detectron2: ModuleType) -> str:
    # What a user meets first: models, data and their dependencies.
    for part in ("modeling", "data", "engine", "evaluation"):
        importlib.import_module(f"detectron2.{part}")
    kind = "pure Python, of tools/install_detectron2.py"
    try:
        importlib.import_module("detectron2._C")
        kind = "with compiled operators"
    except ImportError:
        if not _version_of("detectron2").endswith("+py"):
            kind = "without compiled operators"
    return f"{_version_of('detectron2')}, {kind}"


def _probe_pycocotools(_: ModuleType) -> str:
    importlib.import_module("pycocotools.mask")
    return _version_of("pycocotools")


def _probe_cv2(cv2: ModuleType) -> str:
    registry = importlib.import_module("cv2.videoio_registry")
    backends = map(registry.getBackendName, registry.getStreamBackends())
    return f"{cv2.__version__}, {'reads videos' if 'FFMPEG' in backends else 'reads few videos: no FFmpeg'}"


def _probe_fewshot_d2(_: ModuleType) -> str:
    # Both import what the package itself does not: tables, progress, plots, k-means.
    for part in ("cli.main", "engine"):
        importlib.import_module(f"fewshot_d2.{part}")
    return _version_of("fewshot_d2")


def _plain(package: str) -> Callable[[ModuleType], str]:
    return lambda module: str(getattr(module, "__version__", None) or _version_of(package))


_MODULES: dict[str, Callable[[ModuleType], str]] = {
    "numpy": _plain("numpy"),
    "PIL": _plain("Pillow"),
    "cv2": _probe_cv2,
    "torch": _plain("torch"),
    "torchvision": _probe_torchvision,
    "pycocotools": _probe_pycocotools,
    "detectron2": _probe_detectron2,
    "fewshot_d2": _probe_fewshot_d2,
}


def _opencv_twice() -> list[Finding]:
    """Both packages write into one folder, and whichever is removed breaks the other."""
    both = ("opencv-python", "opencv-python-headless")
    if any(_version_of(package) == _UNKNOWN for package in both):
        return []
    fix = f"pip uninstall -y {both[0]} && pip install --force-reinstall {both[1]}"
    return [Finding(NOTE, "cv2", f"{both[0]} and {both[1]} are both installed", fix)]


def _gpu() -> list[Finding]:
    try:
        torch = importlib.import_module("torch")
        has_gpu, built = torch.cuda.is_available(), torch.version.cuda
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    # Said already, by the finding on torch.
    except Exception:
        return []
    if has_gpu:
        return [Finding(OK, "GPU", f"{', '.join(names)}; CUDA {built}")]
    if shutil.which("nvidia-smi") is None:
        return [Finding(NOTE, "GPU", "none: everything runs on the CPU")]
    if built is None:
        detail = "there is one, but torch is the CPU-only build"
        return [Finding(NOTE, "GPU", detail, _REINSTALL_TORCH)]
    fix = f"a driver for CUDA {built}, or torch for your driver (see `nvidia-smi`)"
    return [Finding(NOTE, "GPU", "there is a driver, but torch cannot use it", fix)]


def _data_sets(every: bool) -> list[Finding]:
    """Whether the files of registered data sets exist; generated ones need none."""
    data = importlib.import_module("detectron2.data")
    root = os.environ.get("DETECTRON2_DATASETS")
    where = Finding(OK, "data", f"DETECTRON2_DATASETS is {root}")
    if not root or not Path(root).is_dir():
        where = Finding(
            NOTE,
            "data",
            f"DETECTRON2_DATASETS is {root or 'not set'}: relative paths are below {root or 'datasets'}/",
            "export DETECTRON2_DATASETS=/folder/with/your/data",
        )
    missing, there, rows = 0, 0, []
    for name in sorted(data.DatasetCatalog.list()):
        metadata = data.MetadataCatalog.get(name)
        paths = [metadata.get(key) for key in ("json_file", "image_root", "dirname")]
        lost = [str(path) for path in paths if path and not os.path.exists(path)]
        missing, there = missing + bool(lost), there + (not lost)
        state = "made when first used" if not any(paths) else "is there"
        rows.append(Finding(NOTE if lost else OK, name, f"no {lost[0]}" if lost else state))
    summary = Finding(
        OK, "data sets", f"{there} registered can be used, {missing} lack their files (--data-sets)"
    )
    return [where, summary, *(rows if every else [])]


def _demo() -> Finding:
    checkpoint = Path("output/demo/model_final.pth")
    if checkpoint.is_file():
        return Finding(OK, "demo model", f"{checkpoint}: `fewshot-d2 find` uses it")
    return Finding(NOTE, "demo model", "none, so `fewshot-d2 find` needs a model", "make demo")
