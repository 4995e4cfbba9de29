"""``fewshot-d2 doctor`` and the start of the command, in a package of its own.

It imports nothing at the top but the standard library, because it must run where detectron2, torch or fewshot_d2 itself
cannot be imported, and say why.
"""

import argparse
import sys
import textwrap
import warnings

from .checks import Finding, examine


def command() -> int:
    """The entry point ``fewshot-d2``."""
    if sys.argv[1:2] == ["doctor"]:
        return main(sys.argv[2:])
    if not sys.warnoptions:
        # detectron2 uses what newer torch deprecates; whoever looks for photos can do nothing about it.
        warnings.filterwarnings("ignore", module=r"torch\.")
    try:
        from fewshot_d2.cli.main import main as run
    # A broken installation raises anything: what and how to mend it is the doctor's to say.
    except Exception as error:
        print(f"fewshot-d2 cannot start: {type(error).__name__}: {error}\n", file=sys.stderr)
        # Whatever the doctor finds, the command was not run.
        return max(main([]), 1)
    return run()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the doctor."""
    parser.add_argument("--data-sets", action="store_true", help="list every registered data set")


def main(arguments: list[str]) -> int:
    """Examine and print; 1 where something must be mended."""
    parser = argparse.ArgumentParser(prog="fewshot-d2 doctor", description="What is installed.")
    add_arguments(parser)
    return report(examine(all_data_sets=parser.parse_args(arguments).data_sets))


def report(findings: list[Finding]) -> int:
    """Print the findings, each with its fix."""
    for finding in findings:
        print(f"{finding.state:8s}{finding.name:14s}{finding.detail}")
        if finding.fix:
            print(textwrap.indent(finding.fix, " " * 22 + "-> "))
    broken = sum(finding.state == "BROKEN" for finding in findings)
    print(f"\n{broken} must be mended" if broken else "\nall that is needed is there")
    return int(broken > 0)
