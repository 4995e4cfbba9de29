"""Pickles of others, read without running code: dicts, lists, strings, numbers and numpy arrays only."""

import pickle
from pathlib import Path
from typing import Any

# What a pickle of numpy arrays needs, under the names of numpy 1 and numpy 2; nothing that acts.
_ARRAY_GLOBALS = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    # No data, as protocol 2 has it: that of an empty array.
    ("__builtin__", "bytes"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
}


# What damaged files make the unpickler and numpy raise besides its own error.
_BROKEN = (
    *(AttributeError, EOFError, ImportError, LookupError, MemoryError, OverflowError),
    *(TypeError, ValueError),
)


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
        pickle.UnpicklingError: it holds anything else, or is broken.
    """
    try:
        with open(path, "rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except _BROKEN as error:
        raise pickle.UnpicklingError(str(error)) from error
