"""Broken and hostile input: every case must give a right result or an error that names the culprit, and write nothing.

    python tools/fuzz_inputs.py --cases 12000 --seed 0

Cases are support specifications, support-set files, images, and runs of ``find`` on folders of such images. A file
that is opened for writing outside the output folder is a failure. Prints counts a kind; exit code 1 on any failure.
"""

import argparse
import contextlib
import io
import os
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import fuzz_archives as archives
import fuzz_images as images
import numpy as np
import torch
from high_water import high_water

from fewshot_d2 import SupportSet
from fewshot_d2.cli.main import main as run_command
from fewshot_d2.decoding import printable, read_rgb
from fewshot_d2.inference.support_editing import support_set_of
from fewshot_d2.support_files import read_features

RIGHT, CLEAR, FAILED = "right result", "clear error", "FAILED"


class Watch:
    """Notes every file that is opened for writing, made or moved outside the folders where that is allowed."""

    def __init__(self) -> None:
        self.allowed: list[str] = []
        self.violations: list[str] = []
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple) -> None:
        if not self.allowed:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            paths = [path]
        elif event in ("os.mkdir", "os.remove", "os.rename", "os.symlink", "os.chmod"):
            paths = [p for p in args[:2] if isinstance(p, (str, bytes, os.PathLike))]
        else:
            return
        for path in map(os.path.abspath, map(os.fsdecode, paths)):
            if not any(path == a or path.startswith(a + os.sep) for a in self.allowed):
                self.violations.append(f"{event} {printable(path)}")

    @contextlib.contextmanager
    def nothing_but(self, *folders: Path):
        """Writing is allowed in these folders alone."""
        self.allowed = [os.path.abspath(folder) for folder in folders] or [os.devnull]
        try:
            yield
        finally:
            self.allowed = []


def judge(attempt: Callable[[], bool], culprit: str) -> str:
    """What came of a case; ``attempt`` says whether its result is right."""
    try:
        return RIGHT if attempt() else f"{FAILED}: wrong result"
    except (ValueError, OSError) as error:
        text = str(error)
        is_clear = culprit in text and text.isprintable() and len(text) < 4000
        return CLEAR if is_clear else f"{FAILED}: unclear {text[:300]!r}, culprit {culprit!r}"
    # Whatever else escapes is what this tool looks for.
    except Exception as error:
        return f"{FAILED}: {type(error).__name__}: {str(error)[:300]}"


def odd_name(rng: Random, suffix: str) -> str:
    """File names as they occur: plain, of other scripts, of bytes that are no UTF-8, with control characters."""
    names = [
        "a",
        "дом",
        "with space",
        "co:lon",
        "new\nline",
        os.fsdecode(b"\xff\xfe"),
        "-rf",
        "[x]*",
        "é" * 60,
    ]
    return rng.choice(names) + suffix


def image_case(folder: Path, rng: Random) -> tuple[str, str]:
    """Kind and outcome of reading one image."""
    kind = rng.choice(list(images.MAKERS))
    path = folder / odd_name(rng, rng.choice([".jpg", ".png", ".tif", ""]))
    expected = images.MAKERS[kind](path, rng)

    def attempt() -> bool:
        pixels = read_rgb(path)
        if expected is None:
            return pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.size > 0
        return np.array_equal(pixels, expected)

    outcome = judge(attempt, printable(path.name))
    if expected is not None and outcome == CLEAR:
        outcome = f"{FAILED}: a good image was refused"
    return f"image, {kind}", outcome


BREAKERS = {
    "good": lambda path, rng: None,
    "index": archives.break_index,
    "features": lambda path, rng: archives.break_index(path, rng, "features.json"),
    "bits": archives.break_bytes,
    "truncated": archives.break_end,
    "traversal": archives.traverse,
    "bomb": archives.bomb,
    "zip header": archives.break_header,
    "link": archives.replace_by_link,
    "no zip": lambda path, rng: path.write_bytes(rng.randbytes(rng.choice([0, 1, 50, 500]))),
}


def archive_case(folder: Path, rng: Random) -> tuple[str, str]:
    """Kind and outcome of reading one support-set file, its features included."""
    # Bombs take a hundred times longer to make than the others.
    weights = [1 if kind == "bomb" else 12 for kind in BREAKERS]
    kind = rng.choices(list(BREAKERS), weights)[0]
    path = folder / odd_name(rng, ".zip")
    support_set = archives.good_set(rng)
    archives.write_good(path, support_set, with_features=kind in ("good", "features", "bits"))
    BREAKERS[kind](path, rng)

    def attempt() -> bool:
        loaded = SupportSet.load(path)
        features = read_features(path)
        if kind != "good":
            return len(loaded) > 0
        shots = zip(sum(loaded.examples, []), sum(support_set.examples, []), strict=True)
        same = all(torch.equal(a.image, b.image) for a, b in shots)
        return same and loaded.class_names == support_set.class_names and len(features) == 1

    outcome = judge(attempt, printable(path.name))
    if kind == "good" and outcome == CLEAR:
        outcome = f"{FAILED}: a good file was refused"
    return f"support-set file, {kind}", outcome


def specification_case(folder: Path, rng: Random) -> tuple[str, str]:
    """Kind and outcome of one ``IMAGE:x,y,w,h:CLASS``."""
    path = folder / odd_name(rng, ".png")
    images.Image.new("RGB", (20, 10), (9, 9, 9)).save(path, "PNG")
    white, small = folder / "white.png", folder / "small.png"
    images.Image.new("L", (20, 10), 255).save(white)
    images.Image.new("L", (19, 10), 255).save(small)
    numbers = [
        "0",
        "3",
        "5.5",
        "-4",
        "19",
        "1e3",
        "1e999",
        "nan",
        "-inf",
        "",
        "x",
        " 2 ",
        "9" * 400,
    ]
    kind = rng.choice(["box", "box outside", "odd box", "whole", "mask", "missing file", "no form"])
    name = rng.choice(["cup", "дом", "a b", "../up", "x" * 300, "\x1b[31m", "=1+1"])
    region = {
        "box": f"{rng.randint(0, 9)},{rng.randint(0, 4)},{rng.randint(1, 9)},{rng.randint(1, 4)}",
        "box outside": f"{rng.choice([-50, 20, 21, 900])},{rng.choice([-50, 10, 99])},{rng.randint(0, 9)},5",
        "odd box": ",".join(rng.choices(numbers, k=rng.randint(2, 6))),
        "mask": f"mask={rng.choice([path, white, small, folder / 'none.png', folder, '/dev/zero'])}",
    }.get(kind, "")
    culprit = path.name
    text = f"{path}:{region}:{name}"
    if kind == "missing file":
        culprit, text = "lost.png", f"{folder / 'lost.png'}::{name}"
    elif kind == "no form":
        culprit = text = rng.choice(
            ["", "a", "::", ":", "a:b", f"{path}:cup", "a.png:1,2:c", "\n:\n:"]
        )
    elif kind == "mask" and str(path) not in region:
        culprit = region.removeprefix("mask=").rpartition("/")[2]

    def attempt() -> bool:
        support_set = support_set_of([text])
        shot = support_set.examples[0][0]
        if kind == "box":
            x, y, width, height = map(int, region.split(","))
            return shot.box.tolist() == [x, y, min(x + width, 20), min(y + height, 10)]
        box = shot.region
        inside = 0 <= box[0] < box[2] <= 20 and 0 <= box[1] < box[3] <= 10
        return bool(inside) and (kind in ("odd box", "whole") or str(white) in region)

    outcome = judge(attempt, printable(culprit))
    if (kind in ("box", "whole") or str(white) in region) and outcome == CLEAR:
        outcome = f"{FAILED}: a good specification was refused"
    return f"specification, {kind}", outcome


def find_case(folder: Path, rng: Random, model: list[str], watch: Watch) -> tuple[str, str]:
    """Outcome of ``find`` on a folder of fuzzed images: all are searched or listed as skipped."""
    photos = folder / "photos"
    photos.mkdir()
    for i in range(8):
        maker = images.MAKERS[rng.choice([k for k in images.MAKERS if k != "linked"])]
        maker(photos / f"{i}{odd_name(rng, '.png')}", rng)
    images.Image.new("RGB", (20, 20), (200, 9, 9)).save(photos / "whole.png")
    number = sum(len(names) for _, _, names in os.walk(photos))
    name = rng.choice(["cup", "../../up", "/abs", "a\nb", os.fsdecode(b"\xff"), "x" * 300])
    output = folder / "output"
    arguments = ["find", *model, "--support", f"{photos / 'whole.png'}::{name}", "--threshold", "0"]

    def attempt() -> bool:
        errors = io.StringIO()
        with (
            watch.nothing_but(output),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(errors),
        ):
            code = run_command([*arguments, "--images", str(photos), "--output", str(output)])
        if code:
            raise ValueError(errors.getvalue())
        rows = [len((output / f).read_text().splitlines()) for f in ("counts.csv", "skipped.csv")]
        return sum(rows) - 2 == number

    outcome = judge(attempt, "")
    if outcome == CLEAR:
        outcome = f"{FAILED}: images that are good were not searched"
    return "find on a folder of eight images", outcome


def write_model(folder: Path) -> list[str]:
    """Arguments of a very small random model."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from inference_cases import write_model as write

    write(folder)
    return ["--config-file", f"{folder}/config.yaml", "--weights", f"{folder}/model_final.pth"]


def main() -> int:
    """Run all cases and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=12000)
    parser.add_argument("--finds", type=int, default=40, help="of them, runs of find")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    watch, counts, failures = Watch(), Counter(), []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = write_model(root) if args.finds else []
        for number in range(args.first, args.first + args.cases):
            rng = Random(f"{args.seed} {number}")
            folder = root / "case" / "inside"
            folder.mkdir(parents=True)
            if number < args.finds:
                kind, outcome = find_case(folder, rng, model, watch)
            else:
                case = (specification_case, archive_case, image_case)[number % 3]
                with watch.nothing_but(folder):
                    kind, outcome = case(folder, rng)
            failures += [f"case {number}: {kind}: {outcome}"] if outcome.startswith(FAILED) else []
            failures += [f"case {number}: {kind}: wrote {v}" for v in watch.violations]
            watch.violations.clear()
            counts[kind, outcome.partition(":")[0]] += 1
            shutil.rmtree(root / "case")
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind:36s}", *(f"{counts[kind, o]:6d} {o}" for o in (RIGHT, CLEAR, FAILED)))
    peak = high_water()
    print(
        f"{sum(counts.values())} cases, seed {args.seed}, {len(failures)} failures, peak {peak:.0f} MB"
    )
    print("\n".join(failures[:20]))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
