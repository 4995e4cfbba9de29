"""What a number was measured with: versions and hardware, for reports."""

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("fewshot_d2", "detectron2", "torch", "torchvision", "numpy", "pycocotools")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide about results."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def hardware() -> dict[str, str]:
    """Processor, cores, threads of torch and GPUs."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "GPU": ", ".join(devices) or "none",
    }


def _processor() -> str:
    """Name of the CPU; Linux tells it only in a file."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
