"""Pickles of others, read without running code: dicts, lists, strings, numbers and numpy arrays only."""

import pickle
from pathlib import Path
from typing import Any

# What a pickle of numpy arrays needs, under the names of numpy 1 and numpy 2; nothing that acts.
_ARRAY_GLOBALS = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings, numbers and numpy arrays; anything else is an error, never a call."""

    def find_class(self, module: str, name: str) -> Any:
        """Allow the names above only."""
        if (module, name) in _ARRAY_GLOBALS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"only arrays are allowed in a pickle, got {module}.{name}")


def load_arrays(path: str | Path) -> Any:
    """Read a pickle, also one of Python 2.

    Raises:
        pickle.UnpicklingError: it holds anything else.
    """
    with open(path, "rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()
