"""Support-set files for ``fuzz_inputs.py``: good ones, broken ones and hostile ones."""

import copy
import functools
import io
import json
import os
import struct
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from fewshot_d2 import Support, SupportFeatures, SupportSet
from fewshot_d2.inference.feature_store import save_keeping_features

ODD_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        2**70,
        -(2**70),
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x",
        "../../a.png",
    ),
    *([], {}, [0, 0, float("nan"), 3], [9, 9, 1, 1], [-5, -5, 900, 900], [0] * 5, "\x00", "\ud800"),
    *([[0, 0], [1, 1]], {"a": 1}, "/etc/passwd", "support_set.json", ["0_0.png"]),
)


def good_set(rng: Random) -> SupportSet:
    """One to three classes of one or two small examples."""
    pixels = np.random.default_rng(rng.getrandbits(32))
    examples = []
    for _ in range(rng.randint(1, 3)):
        shots = []
        for _ in range(rng.randint(1, 2)):
            image = torch.from_numpy(pixels.integers(0, 256, (3, 12, 9), dtype=np.uint8))
            mask = torch.zeros(12, 9, dtype=torch.bool)
            mask[2:6, 1:7] = True
            box = torch.tensor([1.0, 2, 7, 6]) if rng.random() < 0.5 else None
            shots.append(Support(image, box, mask if rng.random() < 0.3 else None))
        examples.append(shots)
    ids = list(range(1, len(examples) + 1))
    return SupportSet(ids, [f"class {i}" for i in ids], examples)


def write_good(path: Path, support_set: SupportSet, *, with_features: bool = False) -> None:
    """A whole file."""
    support_set.save(path)
    if with_features:
        tensors = {"p2": torch.randn(len(support_set), 4), "n": torch.ones(len(support_set)).long()}
        features = SupportFeatures(tensors, support_set.class_ids, support_set.class_names, "X")
        save_keeping_features(path, support_set, {"model": features})


def rewrite(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Write members into a zip."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def members_of(path: Path) -> dict[str, bytes]:
    """All members."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def change_json(content: Any, rng: Random) -> Any:
    """Replace, remove or double one value somewhere in it."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = node if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(content)
    node, key = rng.choice(places)
    if rng.random() < 0.2:
        del node[key]
    elif isinstance(node, list) and rng.random() < 0.3:
        node.append(copy.deepcopy(node[key]))
    else:
        # Values are changed in their turn, and must not be within themselves.
        node[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return content


def break_index(path: Path, rng: Random, name: str = "support_set.json") -> None:
    """Change values of one of the indices."""
    members = members_of(path)
    content = json.loads(members[name])
    for _ in range(rng.randint(1, 3)):
        content = change_json(content, rng) if content else content
    members[name] = json.dumps(content).encode()
    rewrite(path, members)


def break_bytes(path: Path, rng: Random) -> None:
    """Flip a few bits anywhere."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def break_end(path: Path, rng: Random) -> None:
    """Cut it off."""
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def traverse(path: Path, rng: Random) -> None:
    """Members, and names in the index, that point out of the folder."""
    members = members_of(path)
    name = rng.choice(
        ["../outside.png", "../../outside.png", "/tmp/outside.png", "..\\outside.png"]
    )
    content = json.loads(members["support_set.json"])
    content["classes"][0]["examples"][0]["image"] = name
    content["classes"][0]["name"] = rng.choice(["../../up", "/root", "a/../../b", ".."])
    members["support_set.json"] = json.dumps(content).encode()
    if rng.random() < 0.7:
        members[name] = members["0_0.png"]
    rewrite(path, members)


def bomb(path: Path, rng: Random) -> None:
    """A member, or an image, that is small and unpacks to more than there is."""
    members = members_of(path)
    kind = rng.choices(range(4), [10, 10, 1, 5])[0]
    if kind == 0:
        members["0_0.png"] = _ZEROS
    elif kind == 1:
        members["support_set.json"] = b"[" * rng.choice([1000, 100_000, 20_000_000])
    elif kind == 3:
        # One member for thousands of tensors.
        row = {"member": "features/0.bin", "dtype": "uint8", "shape": [1, 32 << 20]}
        tensors = {str(i): row for i in range(rng.choice([100, 5000]))}
        members["features/0.bin"] = _ZEROS[: 32 << 20]
        members["features.json"] = json.dumps({"model": {"tensors": tensors}}).encode()
    else:
        content = json.loads(members["support_set.json"])
        content["classes"][0]["examples"] *= 500
        members["0_0.png"] = _black_png()
        members["support_set.json"] = json.dumps(content).encode()
    rewrite(path, members, zipfile.ZIP_DEFLATED)


_ZEROS = bytes(65 << 20)


@functools.cache
def _black_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(buffer, "PNG")
    return buffer.getvalue()


def break_header(path: Path, rng: Random) -> None:
    """Encrypted, another compression, or a declared size that is a lie."""
    content = bytearray(path.read_bytes())
    entry = content.rfind(b"PK\x01\x02")
    offset, size = rng.choice([(8, 2), (10, 2), (20, 4), (24, 4), (28, 2), (42, 4)])
    content[entry + offset : entry + offset + size] = rng.randbytes(size)
    if offset == 10:
        # Methods that zipfile knows: deflate64, bzip2, LZMA, Zstandard.
        struct.pack_into("<H", content, entry + offset, rng.choice([9, 12, 14, 93, 99]))
    path.write_bytes(content)


def replace_by_link(path: Path, rng: Random) -> None:
    """A symbolic link: to a good file, to itself, to a folder or to nothing."""
    kind = rng.randrange(4)
    target = path.with_name("target.zip")
    os.replace(path, target)
    path.symlink_to([target, path, path.parent, path.with_name("nothing")][kind])
