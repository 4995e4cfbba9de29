"""Evaluate all checkpoints of a run, OUTPUT_DIR, and copy the best to OUTPUT_DIR/model_best.pth.

Choose on data that you report nothing of, the papers' "val"; numbers are in OUTPUT_DIR/selection::

    python tools/select_checkpoint.py --metric AP_voc --config-file configs/silco/vgg16_voc07_ssm.yaml \
        OUTPUT_DIR output/voc07_ssm DATASETS.TEST "('cl_voc07_val',)"
"""

from pathlib import Path

from detectron2.engine import default_argument_parser

from fewshot_d2 import load_config
from fewshot_d2.engine import launch_from_command_line, select_checkpoint, setup


def main(args) -> None:
    """Run in each process."""
    folder = Path(load_config(args.config_file, args.opts).OUTPUT_DIR)
    # The run's own log and config stay as they are.
    args.opts = [*args.opts, "OUTPUT_DIR", str(folder / "selection")]
    select_checkpoint(setup(args), folder, args.metric)


if __name__ == "__main__":
    parser = default_argument_parser(__doc__)
    parser.add_argument(
        "--metric", required=True, help="a number of results.json, e.g. AP50; SILCO's is AP_voc"
    )
    launch_from_command_line(main, parser)
