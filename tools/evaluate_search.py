"""Measure rank lists and what self-paced training (SPIL) made of them, against the annotations of their data sets.

Writes numbers, Recall-IoU curves, pictures and a page to --output; FEWSHOT.SELF_PACED.RANK_LISTS names the lists::

    python tools/evaluate_search.py --config-file configs/spil/flickrlogos27.yaml --output report \
        --run SP=output/sp --run SP+CT=output/sp_ct FEWSHOT.SELF_PACED.RANK_LISTS rank_lists.json
"""

import argparse
import re
import sys
from collections.abc import Sequence

from fewshot_d2 import load_config
from fewshot_d2.engine import setup
from fewshot_d2.engine.reranking import build_describe
from fewshot_d2.engine.search_report import evaluate_search
from fewshot_d2.evaluation.search_page import as_text, counts_table, table


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--output", required=True, help="folder of the report")
    parser.add_argument(
        "--run",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a run's name and OUTPUT_DIR; again for more, which are compared with the first (default: OUTPUT_DIR)",
    )
    parser.add_argument("--search-only", action="store_true", help="measure no run")
    parser.add_argument(
        "--retrieval-config",
        help="re-rank with the features of this config, that of the search (configs/retrieval)",
    )
    parser.add_argument("--pictures", type=int, default=3, help="queries that are drawn")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE ...")
    return parser.parse_args(argv)


def runs_of(pairs: Sequence[str], output_dir: str) -> dict[str, str]:
    """{name: folder} of NAME=FOLDER arguments; without any, OUTPUT_DIR is the run."""
    runs: dict[str, str] = {}
    for pair in pairs or [f"run={output_dir}"]:
        name, _, folder = pair.partition("=")
        if not re.fullmatch(r"[\w+.-]+", name) or not folder or name in runs:
            raise ValueError(
                f"--run must be NAME=FOLDER with different names of letters, digits and _+.-, got {pair!r}"
            )
        runs[name] = folder
    return runs


def evaluate(args: argparse.Namespace) -> None:
    """Measure, write, print."""
    runs = {}
    if not args.search_only:
        runs = runs_of(args.run, load_config(args.config_file, args.opts).OUTPUT_DIR)
    # The run's own log and config stay as they are.
    args.opts = [*args.opts, "OUTPUT_DIR", args.output]
    cfg, describe = setup(args), None
    if args.retrieval_config:
        overrides = ["MODEL.DEVICE", cfg.MODEL.DEVICE, "SEED", cfg.SEED]
        describe = build_describe(load_config(args.retrieval_config, overrides))
    results = evaluate_search(
        cfg, runs, describe, num_pictures=args.pictures, command=" ".join(sys.argv)
    )
    for lines in (table(results["rows"]), counts_table(results["rows"])):
        print(as_text(*lines), end="\n\n")
    print(
        f"rank lists SHA-256 {results['rank_lists']['sha256']}; report: {args.output}/report.html"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool; bad input ends it with one line."""
    try:
        evaluate(parse_args(argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"evaluate_search: {error}") from error


if __name__ == "__main__":
    main()
