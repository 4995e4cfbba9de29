"""Train or test a classifier of distance metric learning (RepMet 5.1); the arguments are those of ``train_net.py``.

OUTPUT_DIR gets the top-1 error with its interval (``results.json``) and a t-SNE of the embedding (``tsne.png``).
"""

from detectron2.engine import default_argument_parser, launch

from fewshot_d2.checkpoint import FewShotCheckpointer
from fewshot_d2.engine import setup
from fewshot_d2.engine.classification import ClassificationTrainer


def main(args) -> dict | None:
    """Run in each process."""
    cfg = setup(args)
    if args.eval_only:
        model = ClassificationTrainer.build_model(cfg)
        FewShotCheckpointer(model, cfg.OUTPUT_DIR).load(cfg.MODEL.WEIGHTS)
        return ClassificationTrainer.test(cfg, model)
    trainer = ClassificationTrainer(cfg)
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
