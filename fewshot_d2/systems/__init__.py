"""One module or small folder a paper. Importing this package registers every system in detectron2."""

import importlib
import pkgutil

from detectron2.config import CfgNode

# A new system is one new module: nothing else has to name it.
SYSTEMS = [
    importlib.import_module(f"{__name__}.{module.name}")
    for module in pkgutil.iter_modules(__path__)
]


def add_system_configs(cfg: CfgNode) -> None:
    """Let every system add its keys."""
    for system in SYSTEMS:
        system.add_config(cfg)
