"""Threads that crop start no teams of threads of their own, and others compute with theirs."""

import subprocess

from tests.support.warm_python import warm_python

SCRIPT = """
import os, threading
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import torch
from evl_cache.extract import begin_crop_thread
from evl_cache.preprocess import spatial_crops

torch.set_num_threads(4)
frames = np.random.default_rng(0).integers(0, 256, (8, 240, 320, 3), dtype=np.uint8)
together = threading.Barrier(3, timeout=60)

def crop():
    return spatial_crops(frames, size=224, mean=(0.5,) * 3, std=(0.5,) * 3)

def crop_together(_):
    together.wait()
    crops = crop()
    torch.ones(300, 300) @ torch.ones(300, 300)
    return torch.equal(crops, expected), torch.get_num_threads()

def tasks():
    return len(os.listdir("/proc/self/task"))

expected = crop()
before = tasks()
with ThreadPoolExecutor(3, initializer=begin_crop_thread, initargs=(True,)) as pool:
    found = list(pool.map(crop_together, range(3)))
    print(tasks() - before, found)
later = []
thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
thread.start()
thread.join()
print(torch.get_num_threads(), later)
"""


def test_crops_in_several_threads_start_no_other_threads() -> None:
    ran = subprocess.run(
        [warm_python(), "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120
    )
    own, others = ran.stdout.splitlines()
    assert own == f"3 {[(True, 1)] * 3}"
    assert others == "4 [4]"  # this thread, and one that began later
