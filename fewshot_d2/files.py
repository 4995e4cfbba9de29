"""Where files are, and writing them so that a crash or a full disk never leaves half of one."""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def atomic_path(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it on success, remove it on failure.

    Args:
        path: the final file. durable: wait until the disk has it, so that not even a power cut leaves half of it; for
            thousands of small pictures that takes longer than making them.

    Raises:
        OSError: with the final file's name, if writing failed; a file that was there before is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if durable:
            _flush_to_disk(temporary)
        # mkstemp makes files that only their owner may read; results are ordinary files.
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise OSError(
            error.errno, f"{path} could not be written and is as it was before: {error}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def only_one_process(lock: str | Path) -> Iterator[None]:
    """Hold the lock file ``lock``; other processes on this machine wait until it is free."""
    lock = Path(lock)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_tensors(path: str | Path, content: Any) -> None:
    """``torch.save``, atomically, to be read with ``weights_only=True``.

    torch turns a failing write into a RuntimeError; it is an OSError here, as that of any other file.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write bytes atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, content: Any, *, indent: int | None = None) -> None:
    """Write JSON atomically; NaN is refused because other readers cannot parse it."""
    write_text(path, json.dumps(content, indent=indent, allow_nan=False))


def canonical_sha256(content: Any) -> str:
    """SHA-256 of the content's canonical JSON: equal content gives equal hashes, however the file was laid out."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def dataset_path(path: str | Path) -> Path:
    """``path``, below the folder ``DETECTRON2_DATASETS`` (default ``datasets``) if relative."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / path
