"""RepMet's classifier: its losses against an independent library, backbones, training, testing and the picture."""

import io
import warnings

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from factories import ROOT
from PIL import Image
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import NCALoss, TripletMarginLoss
from pytorch_metric_learning.miners import BatchEasyHardMiner
from pytorch_metric_learning.reducers import MeanReducer
from scipy.stats import binomtest

from fewshot_d2 import load_config
from fewshot_d2.checkpoint import FewShotCheckpointer
from fewshot_d2.engine.classification import ClassificationTrainer
from fewshot_d2.engine.solver import build_optimizer
from fewshot_d2.evaluation.classification import TopOneEvaluator, wilson_interval
from fewshot_d2.modeling.dml_classifier import DMLClassifier, timm_pooled, torchvision_pooled
from fewshot_d2.visualization.embedding import MAX_CLASSES, tsne_figure

CONFIGS = sorted(p for p in (ROOT / "configs/dml").glob("*.yaml") if not p.name.startswith("Base"))
TINY = [
    *("MODEL.DML.BACKBONE", "regnet_y_400mf", "MODEL.DML.HIDDEN_DIM", 16, "MODEL.DEVICE", "cpu"),
    *("MODEL.DML.EMBEDDING_DIM", 8, "MODEL.DML.NUM_CLASSES", 4, "DATALOADER.NUM_WORKERS", 0),
]


def config(*more):
    return load_config(str(ROOT / "configs/dml/omniglot.yaml"), [*TINY, *more])


def model_of(*more, seed=0):
    torch.manual_seed(seed)
    return build_model(config(*more))


def batch_of(rng, count=8, num_classes=4, side=32):
    return [
        {
            "image": torch.randint(0, 256, (3, side, side), generator=rng, dtype=torch.uint8),
            "label": i % num_classes,
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("modes", [1, 3])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 2.0)])
def test_losses_equal_those_of_another_library(rng, modes, weights):
    options = ("MODEL.DML.NUM_MODES", modes, "MODEL.DML.LOSS_WEIGHTS", weights)
    model = model_of(*options, "MODEL.DML.SIGMA", 0.4, "MODEL.DML.MARGIN", 0.6).double().train()
    batch = batch_of(rng)
    losses = model(batch)
    with torch.no_grad():
        # The batch norms are of this batch again.
        embeddings = model.embed(model.preprocess(batch))
        representatives = model.representatives.flatten(0, 1)
    labels = torch.tensor([x["label"] for x in batch])
    reference = {"ref_emb": representatives, "ref_labels": torch.arange(4).repeat_interleave(modes)}
    squared = LpDistance(normalize_embeddings=True, p=2, power=2)
    entropy = NCALoss(1 / (2 * 0.4**2), distance=squared, reducer=MeanReducer())
    miner = BatchEasyHardMiner(pos_strategy="easy", neg_strategy="hard", distance=squared)
    triplets = miner(embeddings, labels, **reference)
    margin = TripletMarginLoss(0.6, distance=squared, reducer=MeanReducer())
    expected = {
        "loss_cls": weights[0] * entropy(embeddings, labels, **reference),
        "loss_margin": weights[1] * margin(embeddings, labels, triplets, **reference),
    }
    assert set(losses) == set(expected)
    for name, loss in losses.items():
        torch.testing.assert_close(loss.detach(), expected[name], rtol=1e-6, atol=1e-8, msg=name)
    sum(losses.values()).backward()
    gradient = model.representatives.grad
    assert torch.isfinite(gradient).all() and (gradient.abs().sum() > 0)


def test_inference_is_the_normalised_mixture(rng):
    model = model_of().eval()
    batch = batch_of(rng, count=3)
    with torch.no_grad():
        outputs = model(batch)
    modes = torch.nn.functional.normalize(model.representatives.detach(), dim=2)
    for output in outputs:
        embedding = output["embedding"]
        assert embedding.norm().item() == pytest.approx(1, abs=1e-5)
        p = [
            sum(torch.exp(-((embedding - mode) ** 2).sum() / (2 * 0.5**2)) for mode in own)
            for own in modes
        ]
        expected = torch.stack(p) / sum(p)
        torch.testing.assert_close(output["log_posteriors"].exp(), expected)
    # An image does not depend on those beside it, nor on its label.
    with torch.no_grad():
        alone = model([{"image": batch[1]["image"]}])[0]
    torch.testing.assert_close(alone["embedding"], outputs[1]["embedding"], atol=1e-5, rtol=1e-4)


def test_representatives_start_as_unit_vectors_and_widths_are_the_keys():
    model = model_of("MODEL.DML.NUM_MODES", 5)
    assert model.representatives.shape == (4, 5, 8)
    torch.testing.assert_close(model.representatives.norm(dim=2), torch.ones(4, 5))
    kinds = [type(layer).__name__ for layer in model.embedding]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert model.embedding[0].out_features == 16 and model.embedding[3].out_features == 8


@pytest.mark.parametrize(
    ("name", "features", "side"),
    [
        ("inception_v3", 2048, 96),
        ("googlenet", 1024, 32),
        ("resnet18", 512, 32),
        ("mobilenet_v3_small", 1024, 32),
        ("squeezenet1_0", None, 64),
    ],
)
def test_torchvision_backbones_lose_their_last_layer(name, features, side):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if features is None:
            with pytest.raises(ValueError, match=f"end in a fully connected layer, got {name}"):
                torchvision_pooled(name, "")
            return
        backbone = torchvision_pooled(name, "").train()
    assert backbone.num_features == features
    assert backbone(torch.zeros(2, 3, side, side)).shape == (2, features)
    assert not any("ux" in key for key in backbone.state_dict())


@pytest.mark.parametrize(("name", "features"), [("resnet18", 512), ("mobilenetv3_small_050", 1024)])
def test_timm_backbones(name, features):
    pytest.importorskip("timm")
    backbone = timm_pooled(name, "").eval()
    assert backbone.num_features == features
    assert backbone(torch.zeros(2, 3, 64, 64)).shape == (2, features)


def test_weights_of_the_whole_model_are_loaded(tmp_path):
    from torchvision import models

    torch.manual_seed(3)
    whole = models.get_model("regnet_y_400mf", weights=None)
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    model = model_of("MODEL.DML.WEIGHTS", str(tmp_path / "whole.pth"))
    own = model.backbone.bottom_up.state_dict()
    assert own and all(torch.equal(tensor, whole.state_dict()[key]) for key, tensor in own.items())
    with pytest.raises(ValueError, match="must be a local file"):
        model_of("MODEL.DML.WEIGHTS", str(tmp_path / "none.pth"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.DML.BACKBONE", "resnet", "BACKBONE must be a torchvision model"),
        ("MODEL.DML.LIBRARY", "keras", "LIBRARY must be of .*got 'keras'"),
        ("MODEL.DML.NUM_CLASSES", 1, "NUM_CLASSES must be at least 2"),
        ("MODEL.DML.NUM_MODES", 0, "NUM_MODES at least 1"),
    ],
)
def test_keys_that_make_no_model(key, value, message):
    with pytest.raises(ValueError, match=message):
        model_of(key, value)


def test_backbone_has_the_rate_of_a_bottom_up():
    model = model_of()
    optimizer = build_optimizer(config("SOLVER.BACKBONE_MULTIPLIER", 0.1), model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        rate = 1e-4 if name.startswith("backbone.") else 1e-3
        assert rates[id(parameter)] == pytest.approx(rate), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_config_trains_and_runs(path, rng):
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu", "MODEL.DML.WEIGHTS", ""])
    model = build_model(cfg).train()
    assert isinstance(model, DMLClassifier)
    optimizer = build_optimizer(cfg, model)
    before = model.representatives.detach().clone()
    # Inception needs 75 pixels.
    batch = batch_of(rng, count=2, num_classes=cfg.MODEL.DML.NUM_CLASSES, side=80)
    losses = model(batch)
    assert set(losses) == {"loss_cls", "loss_margin"}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert not torch.equal(model.representatives, before)
    with torch.no_grad():
        output = model.eval()(batch)[0]
    assert output["log_posteriors"].shape == (cfg.MODEL.DML.NUM_CLASSES,)
    assert output["embedding"].shape == (cfg.MODEL.DML.EMBEDDING_DIM,)
    balanced = cfg.FEWSHOT.CLASSIFY.CLASSES_PER_BATCH * cfg.FEWSHOT.CLASSIFY.EXAMPLES_PER_CLASS
    assert balanced == 48 and cfg.SOLVER.IMS_PER_BATCH % balanced == 0


def test_there_are_configs():
    assert {path.stem for path in CONFIGS} == {"flowers", "omniglot"}


@pytest.fixture
def folder(tmp_path):
    """Four colours, five shades of each."""
    rng = np.random.default_rng(0)
    for name, color in {"blue": 2, "green": 1, "red": 0, "white": slice(None)}.items():
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(5):
            pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            pixels[..., color] += 120 + 10 * np.uint8(i)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{i}.png")
    return tmp_path


def training_config(folder, output, *more):
    return config(
        *("FEWSHOT.CLASSIFY.TRAIN", str(folder / "set"), "FEWSHOT.CLASSIFY.IMAGE_SIZE", 32),
        *("FEWSHOT.CLASSIFY.TEST", str(folder / "set"), "OUTPUT_DIR", str(folder / output)),
        *("FEWSHOT.CLASSIFY.CLASSES_PER_BATCH", 4, "FEWSHOT.CLASSIFY.EXAMPLES_PER_CLASS", 2),
        *("SOLVER.IMS_PER_BATCH", 8, "SOLVER.WARMUP_ITERS", 0, *more),
    )


def test_tiny_set_is_learned_and_its_results_and_pictures_are_written(folder):
    cfg = training_config(
        folder,
        "run",
        *("SOLVER.MAX_ITER", 30, "VIS_PERIOD", 20, "SOLVER.BASE_LR", 0.004),
        *("MODEL.DML.BACKBONE", "resnet18", "MODEL.DML.EMBEDDING_DIM", 16),
    )
    (folder / "run").mkdir()
    torch.manual_seed(0)
    ClassificationTrainer(cfg).train()
    run = folder / "run"
    weights = str(run / "model_final.pth")
    model = build_model(cfg)
    FewShotCheckpointer(model).load(weights)
    results = ClassificationTrainer.test(cfg, model)["classification"]
    assert results["top1_error"] == 0 and results["images"] == 20
    assert results["top1_error_low"] == 0 and 10 < results["top1_error_high"] < 20
    assert (run / "results.json").is_file()
    for name in ("tsne.png", "tsne_0000000.png", "tsne_0000020.png"):
        assert np.asarray(Image.open(run / name).convert("L")).std() > 5, name


class Interrupted(Exception):
    pass


def test_resumed_run_equals_the_uninterrupted_one(folder, monkeypatch):
    def run(output, *, resume=False):
        cfg = training_config(
            folder,
            output,
            *("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3, "FEWSHOT.CLASSIFY.TEST", ""),
            # It has a dropout.
            *("MODEL.DML.BACKBONE", "mobilenet_v3_small"),
        )
        torch.manual_seed(int(resume))
        trainer = ClassificationTrainer(cfg)
        trainer.resume_or_load(resume=resume)
        return trainer

    (folder / "whole").mkdir(), (folder / "broken").mkdir()
    run("whole").train()
    broken = run("broken")
    step = broken.run_step

    def run_step():
        if broken.iter == 4:
            raise Interrupted
        step()

    broken.run_step = run_step
    with pytest.raises(Interrupted):
        broken.train()
    assert not (folder / "broken" / "model_final.pth").exists()
    resumed = run("broken", resume=True)
    assert resumed.start_iter == 3
    resumed.train()
    first, second = (
        torch.load(folder / name / "model_final.pth", weights_only=True)["model"]
        for name in ("whole", "broken")
    )
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 600), (7, 600), (300, 600), (600, 600), (1, 3)])
def test_interval_equals_scipys(k, n):
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_interval_of_nothing(k, n):
    with pytest.raises(ValueError, match="at least 1 trial"):
        wilson_interval(k, n)


def outputs_for(classes, embeddings=None):
    embeddings = torch.eye(3) if embeddings is None else embeddings
    rows = torch.nn.functional.one_hot(torch.tensor(classes), 3).float()
    return [{"log_posteriors": row, "embedding": embeddings[i % 3]} for i, row in enumerate(rows)]


def test_error_counts_wrong_images_of_all_processes(monkeypatch):
    evaluator = TopOneEvaluator(kept_classes=2, kept_per_class=2)
    evaluator.process([{"label": c} for c in (0, 1, 2, 0, 0)], outputs_for([0, 1, 1, 0, 2]))
    # Of the three images of class 0 two are kept; class 2 is not.
    assert evaluator.evaluate()["classification"]["top1_error"] == pytest.approx(40)
    assert evaluator.labels.tolist() == [0, 0, 1] and evaluator.embeddings.shape == (3, 3)
    monkeypatch.setattr("detectron2.utils.comm.gather", lambda part: [part, part])
    results = evaluator.evaluate()["classification"]
    assert results["images"] == 10 and results["top1_error"] == pytest.approx(40)
    evaluator.reset()
    with pytest.raises(ValueError, match="at least 1 trial"):
        evaluator.evaluate()


def test_picture_is_the_same_every_time_and_shows_all_classes(rng):
    names = [f"class {i}" for i in range(MAX_CLASSES)]
    modes = torch.randn(MAX_CLASSES, 2, 6, generator=rng).numpy()
    labels = np.arange(MAX_CLASSES).repeat(3)
    points = modes[labels, 0] / np.linalg.norm(modes[labels, 0], axis=1, keepdims=True)
    pictures = []
    for _ in range(2):
        figure = tsne_figure(points, labels, modes, class_names=names, title="t")
        file = io.BytesIO()
        figure.savefig(file, format="png")
        pictures.append(file.getvalue())
        assert [t.get_text() for t in figure.legends[0].get_texts()][:-1] == [
            f"{i + 1}  {name}" for i, name in enumerate(names)
        ]
        # Points and stars of each class, and a star for the legend.
        assert len(figure.axes[0].collections) == 2 * MAX_CLASSES + 1
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("points", "labels", "classes", "names"),
    [((0, 4), 0, 2, 2), ((3, 5), 3, 2, 2), ((3, 4), 2, 2, 2), ((3, 4), 3, 2, 3)],
)
def test_picture_of_what_does_not_fit(points, labels, classes, names):
    with pytest.raises(ValueError, match="t-SNE must have points"):
        tsne_figure(
            np.zeros(points),
            np.zeros(labels, int),
            np.zeros((classes, 1, 4)),
            class_names="ab" * 9 if names > classes else "ab",
        )


def test_picture_with_too_many_classes_and_with_few_points():
    many = np.ones((MAX_CLASSES + 1, 1, 4))
    with pytest.raises(ValueError, match=f"at most {MAX_CLASSES} classes"):
        tsne_figure(np.ones((1, 4)), np.zeros(1, int), many, class_names="x" * len(many))
    for count in (1, 2, 5):
        # A collapsed embedding: all in one place.
        points = np.eye(4)[:1].repeat(count, axis=0)
        figure = tsne_figure(points, np.zeros(count, int), np.eye(4)[None, :1], class_names="a")
        assert len(figure.axes[0].collections) == 3
