"""Train a few-shot detector on rank lists, stage after stage (SPIL); arguments as of ``train_net.py``.

FEWSHOT.SELF_PACED.RANK_LISTS is a file of ``make_rank_lists.py`` or of any other search.
"""

from fewshot_d2.engine import launch_from_command_line, setup, train_self_paced


def main(args) -> None:
    """Run in each process."""
    train_self_paced(setup(args), resume=args.resume)


if __name__ == "__main__":
    launch_from_command_line(main)
