"""A small search for tests: an untrained trunk and images of few pixels."""

import torch
from factories import ROOT

from fewshot_d2 import load_config

TINY_RETRIEVAL = ROOT / "configs/retrieval/mobilenet_v2.yaml"
TINY_RETRIEVAL_OVERRIDES = [
    *("MODEL.TORCHVISION.WEIGHTS", "", "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0),
    *("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 64, "FEWSHOT.RETRIEVAL.NUM_REGIONS", 3),
]


def retrieval_config(*overrides, seed=0):
    """The config of a CPU with small images; what is built next has the weights of this seed."""
    torch.manual_seed(seed)
    return load_config(str(TINY_RETRIEVAL), [*TINY_RETRIEVAL_OVERRIDES, *overrides])
