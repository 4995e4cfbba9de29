"""Train a small Siamese Mask R-CNN on generated scenes, evaluate it on classes it never saw, write a report.

No data, no GPU and no download: ``make demo``. An interrupted demo goes on where it stopped.
"""

import argparse
import json
import time
from pathlib import Path

from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from make_example import find_command, make_example

from fewshot_d2.engine import EpisodicTrainer, setup

CONFIG = Path(__file__).resolve().parent.parent / "configs/siamese_mask_rcnn/demo.yaml"


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="output/demo", help="folder of the run")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE ...")
    return parser.parse_args()


def main() -> None:
    """Train, evaluate, print."""
    args = parse()
    start = time.perf_counter()
    options = ["--config-file", str(CONFIG), "OUTPUT_DIR", args.output, *args.opts]
    cfg = setup(default_argument_parser().parse_args(options))
    trainer = EpisodicTrainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    if comm.is_main_process():
        print_summary(Path(args.output), time.perf_counter() - start)
        example = Path(args.output) / "example"
        make_example(example)
        print(f"now find a glyph drawn by hand:\n  {find_command(example)}")


def print_summary(output: Path, seconds: float) -> None:
    """A table of box and mask AP50 with the random-box baseline, and the plans' hashes."""
    results = json.loads((output / "results.json").read_text())
    names = dict.fromkeys(task.rpartition("/")[0] for task in results)
    print(f"\n{'AP50':48s} {'boxes':>7s} {'masks':>7s}")
    for name in names:
        boxes, masks = (results.get(f"{name}/{task}", {}).get("AP50") for task in ("bbox", "segm"))
        print(f"{name:48s} {_number(boxes)} {_number(masks)}")
    for plan in json.loads((output / "plans.json").read_text()):
        print(f"plan {plan['file']}: SHA-256 {plan['sha256']}")
    print(
        f"training and evaluation took {seconds / 60:.1f} minutes; report: {output / 'report.html'}"
    )


def _number(value: float | None) -> str:
    return f"{value:7.1f}" if value is not None else f"{'-':>7s}"


if __name__ == "__main__":
    main()
