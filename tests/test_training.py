"""Training as a whole: resumption, several processes, warm-up, optimizers, repeated evaluation."""

import copy
import dataclasses
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, MetadataCatalog
from factories import ROOT, TINY, TINY_OVERRIDES, tiny_config, tiny_model, write_set

from fewshot_d2.data.coco_json import register_instances
from fewshot_d2.engine import EpisodicTrainer, evaluate
from fewshot_d2.engine.evaluate import evaluation_plans
from fewshot_d2.engine.hooks import SeedEachStep
from fewshot_d2.engine.pretrain import pretrain_detector
from fewshot_d2.engine.solver import build_optimizer, clip_global_norm
from fewshot_d2.engine.trainer import _is_blind

NAME = "training_test_set"
PRETRAINED = ("FEWSHOT.PRETRAIN.MAX_ITER", 5)
LOADED = ("MODEL.WEIGHTS", "x.pth")


def overrides(folder, *more):
    return [
        *("FEWSHOT.REGISTER", [[NAME, str(folder / "instances.json"), str(folder)]]),
        *("DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,)),
        *("FEWSHOT.SUPPORT.DATASET_TRAIN", "", "FEWSHOT.SUPPORT.DATASETS_TEST", ()),
        *("FEWSHOT.TEST.NUM_RUNS", 1, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 0),
        *more,
    ]


@pytest.fixture
def folder(tmp_path):
    write_set(tmp_path)
    yield tmp_path
    if NAME in DatasetCatalog.list():
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


def start_training(folder, output, *more):
    """tools/train_net.py as a user starts it."""
    options = [
        *TINY_OVERRIDES,
        *overrides(folder, "OUTPUT_DIR", str(output), "SOLVER.CHECKPOINT_PERIOD", 3),
        *("SOLVER.MAX_ITER", 8, "TEST.EVAL_PERIOD", 0, "DATASETS.TEST", ()),
        *("FEWSHOT.PRETRAIN.MAX_ITER", 2),
    ]
    command = [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", str(TINY), *more]
    return subprocess.Popen(
        command + [str(option) for option in options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finished(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def test_killed_and_resumed_run_equals_the_uninterrupted_one(folder, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    processes = [start_training(folder, output) for output in (whole, broken)]
    deadline = time.monotonic() + 120
    while not (broken / "last_checkpoint").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    processes[1].wait()
    assert not (broken / "model_final.pth").exists(), "the run was over before it was killed"
    finished(processes[0])
    finished(start_training(folder, broken, "--resume"))
    first, second = (weights(run / "model_final.pth") for run in (whole, broken))
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


# All anchors and ROIs are sampled, so that nothing is left to chance, and norms are frozen, because batch
# statistics are those of one process.
EXHAUSTIVE = [
    *("MODEL.RESNETS.NORM", "FrozenBN", "SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 0.01),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 5000, "MODEL.RPN.POSITIVE_FRACTION", 1.0),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 2000, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
    *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 3, "TEST.EVAL_PERIOD", 0, "DATASETS.TEST", ()),
]


def train_part(rank, world_size, folder, reduction, output):
    torch.set_num_threads(1)
    if world_size > 1:
        store = f"file://{output}/rendezvous"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    options = [*EXHAUSTIVE, "MODEL.MATCH.LOSS_REDUCTION", reduction, "OUTPUT_DIR", str(output)]
    cfg = tiny_config(*overrides(folder, *options))
    register_instances(NAME, str(folder / "instances.json"), str(folder))
    torch.manual_seed(0)
    trainer = EpisodicTrainer(cfg)
    trainer.train()
    if world_size > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("reduction", ["detectron2", "original"])
def test_two_processes_train_to_the_weights_of_one(folder, tmp_path, reduction):
    """Tolerance 1e-5: sums are taken in another order."""
    one, two = tmp_path / "one", tmp_path / "two"
    for output, world_size in ((one, 1), (two, 2)):
        output.mkdir()
        mp.spawn(train_part, (world_size, folder, reduction, output), nprocs=world_size)
    first, second = (weights(run / "model_final.pth") for run in (one, two))
    start = tiny_model(*EXHAUSTIVE).state_dict()
    moved = max((first[name] - start[name]).abs().max().item() for name in first)
    assert moved > 1e-3, "the comparison needs weights that moved"
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_heads_only_warmup_keeps_the_bottom_up(folder, tmp_path):
    options = ("SOLVER.MAX_ITER", 3, "SOLVER.HEADS_ONLY_ITERS", 2, "DATASETS.TEST", ())
    cfg = tiny_config(*overrides(folder, *options, "OUTPUT_DIR", str(tmp_path / "run")))
    register_instances(NAME, str(folder / "instances.json"), str(folder))
    trainer = EpisodicTrainer(cfg)
    snapshots = [snapshot(trainer.model)]
    after_step = trainer.after_step

    def record():
        after_step()
        snapshots.append(snapshot(trainer.model))

    trainer.after_step = record
    trainer.train()
    for step, (bottom_up_moves, before, after) in enumerate(
        zip((False, False, True), snapshots, snapshots[1:], strict=False)
    ):
        for name in before:
            moved = not torch.equal(before[name], after[name])
            if name.startswith("backbone.bottom_up"):
                assert bottom_up_moves or not moved, (step, name)
        assert any(
            not torch.equal(before[n], after[n]) for n in before if n.startswith("roi_heads")
        )
    last, end = snapshots[-2:]
    assert any(not torch.equal(last[n], end[n]) for n in last if n.startswith("backbone.bottom_up"))


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_same_plan_gives_identical_detections(folder, tmp_path):
    register_instances(NAME, str(folder / "instances.json"), str(folder))
    model = tiny_model("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3)
    contents = []
    for run in ("a", "b"):
        cfg = tiny_config(*overrides(folder, "OUTPUT_DIR", str(tmp_path / run)))
        results = evaluate(cfg, model)
        files = sorted((tmp_path / run / "inference").rglob("*.json"))
        assert len(files) == 1, "one file a plan"
        contents.append([path.read_bytes() for path in files])
        assert f"{NAME}/all/bbox" in results
        assert (tmp_path / run / "report.html").stat().st_size > 1000
    assert contents[0] == contents[1] and all(len(content) > 100 for content in contents[0])


def test_plan_of_another_split_is_refused(folder, tmp_path):
    """Its "novel" classes may be ones that the model was trained on."""
    register_instances(NAME, str(folder / "instances.json"), str(folder))
    own = overrides(folder, "FEWSHOT.TEST.SIDES", ("novel",), "OUTPUT_DIR", str(tmp_path / "run"))
    plan = evaluation_plans(tiny_config(*own, "FEWSHOT.SPLIT", "every_4th:1"))[0]
    path = str(tmp_path / "run" / "plans" / plan.file_name)
    with_plan = [*own, "FEWSHOT.TEST.PLANS", (path,)]
    assert evaluation_plans(tiny_config(*with_plan, "FEWSHOT.SPLIT", "every_4th:1")) == [plan]
    with pytest.raises(ValueError, match=r"must be a plan of .* 'every_4th:2'"):
        evaluation_plans(tiny_config(*with_plan, "FEWSHOT.SPLIT", "every_4th:2"))
    dataclasses.replace(plan, side="base").save(path)
    with pytest.raises(ValueError, match="base classes only"):
        evaluation_plans(tiny_config(*with_plan, "FEWSHOT.SPLIT", "every_4th:1"))


def test_side_without_a_class_is_skipped(folder, tmp_path):
    register_instances(NAME, str(folder / "instances.json"), str(folder))
    cfg = tiny_config(
        *overrides(folder, "FEWSHOT.TEST.SIDES", ("novel", "base"), "OUTPUT_DIR", str(tmp_path))
    )
    assert [plan.side for plan in evaluation_plans(cfg)] == ["base"]


def test_clipping_leaves_out_groups_that_stand_still(rng):
    still, moving = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [still], "lr": 0.0}, {"params": [moving], "lr": 1.0}])
    clip_global_norm(optimizer, 5.0)
    still.grad, moving.grad = torch.full((3,), 1e6), torch.ones(3)
    optimizer.step()
    assert torch.equal(moving.data, -torch.ones(3))


def test_optimizer_groups():
    model = tiny_model()
    cfg = tiny_config("SOLVER.BACKBONE_MULTIPLIER", 0.1, "SOLVER.WEIGHT_DECAY", 0.02)
    optimizer = build_optimizer(cfg, model)
    grouped = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(grouped) == sum(p.requires_grad for p in model.parameters())
    for name, parameter in model.named_parameters():
        group = grouped[id(parameter)]
        bottom_up = name.startswith("backbone.bottom_up")
        assert group["bottom_up"] == bottom_up
        assert group["lr"] == pytest.approx(cfg.SOLVER.BASE_LR * (0.1 if bottom_up else 1.0))
        assert group["weight_decay"] == (0.02 if parameter.dim() > 1 else 0.0)
    with pytest.raises(ValueError, match="'LION'"):
        build_optimizer(tiny_config("SOLVER.OPTIMIZER", "LION"), model)


@pytest.mark.parametrize("scale", [0.1, 100.0])
def test_clipping_is_by_the_norm_over_all_parameters(rng, scale):
    parameters = [torch.nn.Parameter(torch.randn(3, generator=rng)) for _ in range(2)]
    before = copy.deepcopy([p.data for p in parameters])
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    clip_global_norm(optimizer, 5.0)
    gradients = [scale * torch.randn(3, generator=rng) for _ in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    norm = sum((g**2).sum() for g in gradients) ** 0.5
    factor = min(1.0, 5.0 / norm.item())
    for parameter, old, gradient in zip(parameters, before, gradients, strict=True):
        torch.testing.assert_close(parameter.data, old - factor * gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("keys", "is_warned"),
    [
        ((), True),
        (("FEWSHOT.PRETRAIN.MAX_ITER", 1), False),
        (("MODEL.RESNETS.NORM", "BN"), False),
        (("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 4), True),
    ],
)
def test_what_is_frozen_before_it_has_seen_an_image_is_warned_of(folder, caplog, keys, is_warned):
    plain = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.WEIGHTS", "")
    more = overrides(folder, "OUTPUT_DIR", str(folder / "run"), "FEWSHOT.PRETRAIN.MAX_ITER", 0)
    EpisodicTrainer(tiny_config(*more, *plain, *keys))
    assert ("frozen before they have seen an image" in caplog.text) == is_warned


@pytest.mark.parametrize(
    ("backbone", "options", "expected"),
    [
        ("build_resnet_fpn_backbone", ("MODEL.BACKBONE.FREEZE_AT", 2), True),
        ("build_resnet_fpn_backbone", ("MODEL.RESNETS.NORM", "FrozenBN"), True),
        ("build_resnet_fpn_backbone", (), False),
        ("build_resnet_fpn_backbone", ("MODEL.BACKBONE.FREEZE_AT", 2, *PRETRAINED), False),
        ("build_resnet_fpn_backbone", ("MODEL.BACKBONE.FREEZE_AT", 2, *LOADED), False),
        ("build_torchvision_fpn_backbone", ("MODEL.BACKBONE.FREEZE_AT", 2), True),
        ("build_torchvision_fpn_backbone", ("MODEL.TORCHVISION.NORM", "FrozenBN"), True),
        ("build_torchvision_fpn_backbone", ("MODEL.TORCHVISION.WEIGHTS", "x.pth"), False),
        ("build_timm_fpn_backbone", ("MODEL.BACKBONE.FREEZE_AT", 2), False),
        ("build_timm_fpn_backbone", ("MODEL.TIMM.NORM", "FrozenBN"), True),
        ("build_ssd_vgg16_backbone", ("MODEL.RESNETS.NORM", "FrozenBN"), False),
    ],
)
def test_frozen_layers_without_weights_are_warned_of(backbone, options, expected):
    start = ("MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.TORCHVISION.NORM", "BN", "MODEL.TIMM.NORM", "BN")
    cfg = tiny_config("MODEL.BACKBONE.NAME", backbone, "MODEL.WEIGHTS", "", *start, *options)
    assert _is_blind(cfg) is expected


def test_large_seeds_are_seeds_of_torch():
    """torch takes 64 bits; steps of neighbouring seeds stay apart."""
    states = set()
    for seed in (0, 1, 20240101, 2**40):
        hook = SeedEachStep(seed)
        for hook.trainer in (SimpleNamespace(iter=0), SimpleNamespace(iter=7)):
            hook.before_step()
            states.add(torch.initial_seed())
    assert states >= {0, 7, 2**40, 2**40 + 7} and len(states) == 6


def test_pretraining_of_what_has_no_objects_is_refused():
    with pytest.raises(ValueError, match=r"PRETRAIN\.MAX_ITER must be 0 .* got 5 for object"):
        pretrain_detector(tiny_config(*PRETRAINED), tiny_model(), object())
