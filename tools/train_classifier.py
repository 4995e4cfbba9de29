"""Train or test a classifier of distance metric learning (RepMet 5.1); the arguments are those of ``train_net.py``.

OUTPUT_DIR gets the top-1 error with its interval (``results.json``) and a t-SNE of the embedding (``tsne.png``).
"""

from fewshot_d2.checkpoint import FewShotCheckpointer
from fewshot_d2.engine import launch_from_command_line, setup
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
    launch_from_command_line(main)
