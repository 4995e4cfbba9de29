"""Train or evaluate a few-shot detector; the arguments are those of detectron2's own ``train_net.py``.

Several processes on the CPU: ``torchrun --nproc-per-node 2 tools/train_net.py ...``.
"""

from detectron2.engine import default_argument_parser, launch

from fewshot_d2.engine import EpisodicTrainer, evaluate_only, setup


def main(args) -> dict:
    """Run in each process."""
    cfg = setup(args)
    if args.eval_only:
        return evaluate_only(cfg)
    trainer = EpisodicTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
