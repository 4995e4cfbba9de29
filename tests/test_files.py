"""Files are whole or not there; hashes depend on content alone."""

import errno
import threading

import pytest

from fewshot_d2.files import (
    atomic_path,
    canonical_sha256,
    only_one_process,
    write_json,
    write_text,
)


def test_success_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_failure_keeps_the_older_file(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(type(error)), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_full_disk_names_the_file(tmp_path):
    with (
        pytest.raises(OSError, match="a.txt could not be written"),
        atomic_path(tmp_path / "a.txt"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_only_one_process_holds_the_lock(tmp_path):
    lock, order = tmp_path / "lock", []

    def second():
        with only_one_process(lock):
            order.append("second")

    with only_one_process(lock):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_nan_is_no_json(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_hash_depends_on_content_alone():
    assert canonical_sha256({"a": 1, "b": [2]}) == canonical_sha256({"b": [2], "a": 1})
    assert canonical_sha256({"a": 1}) != canonical_sha256({"a": 2})
