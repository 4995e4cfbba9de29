"""From command-line arguments to a frozen config, in each process of a run."""

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..config import load_config
from ..data.loaders import register_from_config


def setup(args: argparse.Namespace) -> CfgNode:
    """Config, logging, seeds and data sets of this process; ``args`` of detectron2's parser."""
    join_torchrun()
    cfg = load_config(args.config_file, args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="fewshot_d2")
    register_from_config(cfg)
    return cfg


def launch_from_command_line(
    main: Callable[[argparse.Namespace], Any], parser: argparse.ArgumentParser | None = None
) -> None:
    """Run ``main`` in every process that the arguments of detectron2's parser, or of one with more, ask for."""
    args = (parser or default_argument_parser()).parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def join_torchrun() -> None:
    """Join the process group that ``torchrun`` describes in the environment, if it does (gloo on the CPU)."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return
    if int(os.environ["WORLD_SIZE"]) == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
