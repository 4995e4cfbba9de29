"""Train or evaluate a few-shot detector; the arguments are those of detectron2's own ``train_net.py``.

Several processes on the CPU: ``torchrun --nproc-per-node 2 tools/train_net.py ...``.
"""

from fewshot_d2.engine import EpisodicTrainer, evaluate_only, launch_from_command_line, setup


def main(args) -> dict:
    """Run in each process."""
    cfg = setup(args)
    if args.eval_only:
        return evaluate_only(cfg)
    trainer = EpisodicTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    launch_from_command_line(main)
