"""OS2D and the search for hard patches together: a small training in which the one feeds the other."""

import torch
from factories import ROOT, set_fixture
from test_os2d import TINY
from torch import nn

from fewshot_d2 import load_config
from fewshot_d2.data.patch_pool import PatchPool
from fewshot_d2.engine import EpisodicTrainer

NAME = "os2d_mining_set"


folder = set_fixture(NAME)


def config(folder):
    """Pictures of 60 x 40 pixels, so large that their objects are as large as anchors; two searches in 5 iterations."""
    return load_config(
        str(ROOT / "configs/os2d/R_50_grozi_v2.yaml"),
        [
            *TINY,
            *("DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (), "OUTPUT_DIR", str(folder / "out")),
            *("FEWSHOT.SUPPORT.DATASET_TRAIN", "", "FEWSHOT.SUPPORT.DATASETS_TEST", ()),
            *("FEWSHOT.SPLIT", "novel:b", "FEWSHOT.NUM_WAYS", 2, "FEWSHOT.NUM_ABSENT_WAYS", 1),
            *("INPUT.MIN_SIZE_TRAIN", (480,), "INPUT.MAX_SIZE_TRAIN", 720),
            *("FEWSHOT.PATCHES.SIZE", 256, "MODEL.OS2D.PATCH_SIZE", 256),
            *("FEWSHOT.MINING.PERIOD", 2, "FEWSHOT.MINING.IMAGES", 3),
            *("FEWSHOT.MINING.NUM_SCALES", 1, "FEWSHOT.MINING.SCALES", (0.8, 1.0)),
            *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 5, "SOLVER.STEPS", ()),
            *("SOLVER.CHECKPOINT_PERIOD", 10, "TEST.EVAL_PERIOD", 0, "MODEL.WEIGHTS", ""),
            *("FEWSHOT.PRETRAIN.MAX_ITER", 0),
        ],
    )


def test_mined_patches_are_trained_on(folder, monkeypatch):
    trainer = EpisodicTrainer(config(folder))
    trainer.resume_or_load(resume=False)
    model, episodes = trainer.checkpointer.model, trainer._trainer.data_loader.episodes
    shown, losses, modes, compute = [], [], [], model.losses

    def recorded(batch, *arguments):
        shown.append([episodes.sample(x["episode_id"]) for x in batch])
        modes.append({m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d)})
        losses.append(compute(batch, *arguments))
        return losses[-1]

    monkeypatch.setattr(model, "losses", recorded)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    pools = [PatchPool.load(PatchPool.path(episodes.folder, iteration)) for iteration in (2, 4)]
    for pool in pools:
        # Scores of negatives, and boxes of positives: objects are found at these scales.
        assert {"neg", "pos_loc"} <= {patch.kind for patch in pool.patches}
        assert all(patch.loss > 0 for patch in pool.patches)
        assert len({patch.image_id for patch in pool.patches}) == 3
    mined = []
    for iteration, batch in enumerate(shown):
        for episode in batch:
            if episode.window is None:
                continue
            (patch, *_) = [
                p
                for p in pools[iteration // 2 - 1].patches
                if (p.image_id, p.window) == (episode.query["image_id"], episode.window)
            ]
            assert patch.class_id in episode.class_ids
            mined.append(iteration)
    assert mined and min(mined) >= 2
    assert modes == [{False}] * 5, "V2 keeps all statistics, before and after a search"
    assert all(torch.isfinite(loss) for of_batch in losses for loss in of_batch.values())
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.isfinite(p).all() for p in model.parameters())
