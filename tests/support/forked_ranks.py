"""Several processes of a run, forked, that tell each other what they gather through pipes; no rendezvous is needed."""

import multiprocessing
from dataclasses import dataclass

import torch

from evl_cache.processes import Processes, ProcessPlace

FORK = multiprocessing.get_context("fork")


class Piped(Processes):
    """Processes that tell each other what they gather through a server of pipes. `pipe`: to it."""

    def gather(self, value, when):
        pipe = PIPES[self.place.rank]
        pipe.send(value)
        return pipe.recv()


PIPES: dict = {}


def together(world, function):
    """What `function` returns in each of some processes, by rank, or raises; it is called with one's `Processes`."""
    ends = [FORK.Pipe() for _ in range(world)]

    def run(rank):
        PIPES[rank] = ends[rank][1]
        torch.set_num_threads(1)  # those of before the fork are gone
        try:
            result = function(Piped(place=ProcessPlace(rank=rank, world=world, local_world=world)))
        except BaseException as error:
            result = error
        ends[rank][1].send(_Ended(result))

    children = [FORK.Process(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for child in children:
        child.start()
    try:
        while True:
            values = [end.recv() for end, _ in ends]
            if any(isinstance(value, _Ended) for value in values):
                return [value.result for value in values]
            for end, _ in ends:
                end.send(values)
    finally:
        for child in children:
            child.kill()
            child.join()


@dataclass
class _Ended:
    result: object
