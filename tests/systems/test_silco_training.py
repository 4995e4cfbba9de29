"""SILCO in the trainer: several processes, and what is decayed."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES
from factories import ROOT, write_set
from silco_cases import small_silco

from fewshot_d2 import load_config
from fewshot_d2.data.coco_json import register_instances
from fewshot_d2.data.datasets.common_localization import VID_CLASSES
from fewshot_d2.data.splits import resolve_split
from fewshot_d2.engine import EpisodicTrainer
from fewshot_d2.engine.plans import support_datasets
from fewshot_d2.engine.solver import build_optimizer

NAME = "silco_training_test_set"
# Nothing is drawn in a step, and the last maps are used by nothing, as in the five scales of the paper.
OPTIONS = [
    *("MODEL.DEVICE", "cpu", "INPUT.MAX_SIZE_TRAIN", 64, "INPUT.MAX_SIZE_TEST", 64),
    *("FEWSHOT.PRETRAIN.MAX_ITER", 0, "MODEL.RESNETS.NORM", "FrozenBN"),
    *("MODEL.SILCO.SOURCES", (0, 1), "MODEL.SILCO.DROPOUT", 0.0),
    *("MODEL.SILCO.REWEIGHTING_DROPOUT", 0.0, "MODEL.SILCO.NORMALIZE_WEIGHTS", True),
    *("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 0.01, "SOLVER.WARMUP_ITERS", 0),
    *("SOLVER.CLIP_GLOBAL_NORM", 0.0, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 3),
    *("FEWSHOT.NUM_SHOTS", 2, "FEWSHOT.SPLIT", "novel:b", "DATALOADER.NUM_WORKERS", 0),
    *("DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (), "MODEL.BACKBONE.FREEZE_AT", 0),
]


def config(folder, output):
    own = ["FEWSHOT.REGISTER", [[NAME, str(folder / "instances.json"), str(folder)]]]
    file = ROOT / "configs/silco/omniglot_ssm_frm.yaml"
    return load_config(str(file), [*OPTIONS, *own, "OUTPUT_DIR", str(output)])


def train_part(rank, world_size, folder, output):
    torch.set_num_threads(1)
    if world_size > 1:
        store = f"file://{output}/rendezvous"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    register_instances(NAME, str(folder / "instances.json"), str(folder))
    torch.manual_seed(0)
    EpisodicTrainer(config(folder, output)).train()
    if world_size > 1:
        dist.destroy_process_group()


def test_all_weights_are_decayed_as_in_the_original():
    """``optim.SGD(parameters, weight_decay=5e-4)``; the scale of the first map and biases have one axis."""
    cfg = load_config(str(ROOT / "configs/silco/vgg16_voc07_ssm_frm.yaml"))
    groups = build_optimizer(cfg, small_silco()).param_groups
    assert {g["weight_decay"] for g in groups} == {0.0005}
    assert {p.dim() for g in groups for p in g["params"]} == {1, 2, 4}


def test_supports_of_videos_come_from_the_images():
    """Every class of VOC is trained, and none of them is searched."""
    cfg = load_config(str(ROOT / "configs/silco/vgg16_vid_ssm_frm.yaml"))
    (source,) = support_datasets(cfg)
    assert (cfg.DATASETS.TEST, source) == (("cl_vid_test_30th",), "cl_vid_support")
    assert resolve_split(cfg.FEWSHOT.SPLIT, range(1, 21), VOC_CLASSES).base == tuple(range(1, 21))
    assert cfg.FEWSHOT.TEST.SIDES == ("all",) and not set(VOC_CLASSES) & set(VID_CLASSES.values())


def test_two_processes_train_to_the_weights_of_one(tmp_path):
    """Losses are divided by the positives of the whole batch, which the processes have different numbers of."""
    one, two = tmp_path / "one", tmp_path / "two"
    write_set(tmp_path)
    for output, world_size in ((one, 1), (two, 2)):
        output.mkdir()
        mp.spawn(train_part, (world_size, tmp_path, output), nprocs=world_size)
    first, second = (
        torch.load(run / "model_final.pth", weights_only=False)["model"] for run in (one, two)
    )
    assert first.keys() == second.keys()
    moved = first["head.classification_head.module_list.0.bias"].abs().max()
    assert moved > 1e-3, "the comparison needs weights that moved"
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
