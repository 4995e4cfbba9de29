"""What ``fewshot-d2 find`` costs beyond the model itself, and whether its memory grows with the number of pictures.

Pictures are noise, and without --weights the model is random: the threshold is set so that some detections are
drawn, cut out and counted, as in a real run. Rounds of the model alone and of ``find`` alternate, so that slow spells
of the machine hit both alike.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from fewshot_d2 import FewShotPredictor, Support, SupportSet, load_config
from fewshot_d2.inference.find import find
from fewshot_d2.inference.result_folder import ResultFolder
from fewshot_d2.inference.sources import Picture, Pictures


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default="configs/siamese_mask_rcnn/demo.yaml")
    parser.add_argument("--weights", default="", help="default: random weights")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=4, help="the images are cut into so many")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--drawn", type=int, default=5, help="detections a picture, about")
    parser.add_argument("--memory", action="store_true", help="measure memory, not time")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides")
    return parser.parse_args()


def make_photos(folder: Path, number: int, size: tuple[int, int]) -> None:
    """JPEGs that look like nothing; at most 20 are different, the others are links to them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(number):
        path = folder / f"{i:06d}.jpg"
        if i < 20:
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(4))
            picture.save(path, quality=90)
        else:
            os.link(folder / f"{i % 20:06d}.jpg", path)


def make_predictor(args: argparse.Namespace) -> FewShotPredictor:
    """With one class of one example."""
    torch.manual_seed(0)
    overrides = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.DEVICE", "cpu", *args.opts]
    predictor = FewShotPredictor(load_config(args.config_file, overrides), args.weights)
    example = Support(torch.randint(0, 256, (3, 60, 60), dtype=torch.uint8))
    predictor.set_support(SupportSet([1], ["thing"], [[example]]))
    return predictor


def usual_threshold(predictor: FewShotPredictor, files: list[str], drawn: int) -> float:
    """The score that about so many detections a picture reach."""
    scores = torch.cat([found.scores for found in predictor.predict(files)])
    wanted = min(drawn * len(files), len(scores))
    return float(scores.sort(descending=True).values[wanted - 1]) if wanted else 0.5


def run_find(
    predictor: FewShotPredictor, files: list[str], output: str, threshold: float, progress=iter
) -> int:
    """Number of detections that were drawn."""
    folder = ResultFolder(output, class_ids=[1], class_names=["thing"], thresholds=[threshold])
    pictures = [Picture(file, Path(file).stem) for file in files]
    return sum(find(predictor, pictures, folder, progress=progress).counts)


def clocks() -> np.ndarray:
    """Seconds that have passed, and seconds of all processors that this process has used: others do not count."""
    return np.array([time.perf_counter(), time.process_time()])


@torch.no_grad()
def seconds_of_model(predictor: FewShotPredictor, files: list[str]) -> np.ndarray:
    """``clocks`` of the model alone, on pictures that are read and resized already."""
    queries = [predictor._prepared(file, lambda f: Picture(f, "").read()) for file in files]
    start = clocks()
    for i in range(0, len(queries), predictor.batch_size):
        predictor._detect(queries[i : i + predictor.batch_size])
    return clocks() - start


def measure_time(predictor: FewShotPredictor, args: argparse.Namespace, folder: Path) -> None:
    """Print both times and their ratio."""
    files = Pictures([str(folder / "photos")]).files
    threshold = usual_threshold(predictor, files[:20], args.drawn)
    alone, whole, drawn = np.zeros(2), np.zeros(2), 0
    for i in range(args.rounds):
        part = files[i :: args.rounds]
        alone += seconds_of_model(predictor, part)
        start = clocks()
        drawn += run_find(predictor, part, str(folder / f"out{i}"), threshold)
        whole += clocks() - start
    print(
        f"{len(files)} pictures {args.size[0]}x{args.size[1]}, {torch.get_num_threads()} threads, "
        f"{drawn / len(files):.1f} detections drawn a picture"
    )
    for name, of_model, of_find in zip(("elapsed", "processor"), alone, whole, strict=True):
        print(
            f"{name:10s} model alone {of_model:.2f} s ({1000 * of_model / len(files):.1f} ms a picture), "
            f"find {of_find:.2f} s: ratio {of_find / of_model:.3f} (bound for elapsed time: 1.15)"
        )


def measure_memory(predictor: FewShotPredictor, args: argparse.Namespace, folder: Path) -> None:
    """Print the memory in use after each tenth of the pictures."""
    files = Pictures([str(folder / "photos")]).files
    threshold = usual_threshold(predictor, files[:20], args.drawn)
    step = max(len(files) // 10, 1)
    readings = []

    def watched(queries: Iterable) -> Iterator:
        for number, query in enumerate(queries, start=1):
            yield query
            if number % step == 0:
                readings.append(resident_megabytes())
                print(f"{number:7d} pictures: {readings[-1]:8.1f} MB", flush=True)

    run_find(predictor, files, str(folder / "out"), threshold, watched)
    print(
        f"from the first tenth to the last: {readings[-1] - readings[0]:+.1f} MB for "
        f"{len(files) - step} pictures"
    )


def resident_megabytes() -> float:
    """Memory of this process that is in RAM (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Make pictures, measure, print."""
    args = parse()
    predictor = make_predictor(args)
    with tempfile.TemporaryDirectory() as name:
        make_photos(Path(name) / "photos", args.images, tuple(args.size))
        (measure_memory if args.memory else measure_time)(predictor, args, Path(name))


if __name__ == "__main__":
    main()
