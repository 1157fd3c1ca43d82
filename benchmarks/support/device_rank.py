"""One process of two that train on one device: `python -m benchmarks.support.device_rank TRAIN VAL OUT OPTIONS`.

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say which one it is. They meet by gloo, as NCCL takes no device twice.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from evl_cache.processes import Processes, ProcessPlace
from evl_cache.store import FeatureCache
from evl_cache.train import TrainOptions, train


def main(arguments: list[str]) -> None:
    """Take the steps of this process."""
    train_cache, val_cache, out, options = arguments
    chosen = TrainOptions(**json.loads(options))
    if chosen.device.startswith("cuda"):
        torch.cuda.set_device(0)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    processes = Processes(place=ProcessPlace.of_environment())
    train(
        FeatureCache(train_cache), FeatureCache(val_cache), options=chosen, out=Path(out), processes=processes
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
