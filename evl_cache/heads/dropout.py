"""Dropout whose masks belong to samples: they are the same in any process, pass of a step, or place in a batch.

B samples, F values of a sample.

A mask is no draw from a generator that goes on, but a function of numbers: of a sample's key, the layer, and the place of a
value. Two rounds of the mixer of SplitMix64 (Steele et al., OOPSLA 2014) make 64 bits of their sum, in whole-number
operations that every device has. Nothing is kept from one call to the next, so a CUDA graph can record it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from evl_cache.errors import UsageError

_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # multipliers of SplitMix64


class Dropout(nn.Dropout):
    """Torch's dropout; where a training gives keys of samples (`SampleMasks`), each sample's mask comes from its key.

    Whoever trains a head in a loop of their own has torch's dropout, with torch's generator.
    """

    draw: Callable[[Tensor], Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return values, (B, ...) as they came, some of them zero in training."""
        if self.draw is None or not self.training or not self.p:
            return super().forward(input)
        return input * self.draw(input)


class SampleMasks:
    """The masks of a head's dropout in a training.

    Args:
        head: whose `Dropout` layers they are for.
    """

    def __init__(self, head: nn.Module) -> None:
        self._layers = [module for module in head.modules() if isinstance(module, Dropout)]
        self._places: dict[tuple[int, int, torch.device, type[Tensor]], Tensor] = {}

    @contextmanager
    def of(self, keys: Tensor | None) -> Iterator[None]:
        """Have the head's dropout draw by the keys of the samples that it is given, until the end of the block.

        Args:
            keys: of `sample_keys`, (B,), where the head is; None leaves it to torch.
        """
        try:
            for number, layer in enumerate(self._layers):
                layer.draw = None if keys is None else partial(self._factors, number, layer.p, keys)
            yield
        finally:
            for layer in self._layers:
                layer.draw = None

    def _factors(self, number: int, probability: float, keys: Tensor, like: Tensor) -> Tensor:
        """Return what a layer's values (B, ...) are multiplied by: 0, or what keeps their mean."""
        if len(like) != len(keys):
            raise UsageError(
                f"dropout got values {tuple(like.shape)} of {len(keys)} samples; expected one row for each sample"
            )
        bits = keys[:, None] + self._places_of(number, like[0].numel(), keys)
        # A shift of signed numbers copies the sign, which costs one bit of 64.
        bits ^= bits >> 30
        bits *= _signed(_FIRST)
        bits ^= bits >> 27
        bits *= _signed(_SECOND)
        kept = bits >= int(probability * 2**64) - 2**63
        return kept.to(like.dtype).mul_(1 / (1 - probability)).view_as(like)

    def _places_of(self, number: int, size: int, keys: Tensor) -> Tensor:
        """Return a number for each value of a sample in a layer, int64 (F,); made once, as a copy waits for a GPU."""
        kind = number, size, keys.device, type(keys)  # fake ones are for fake keys alone
        if kind not in self._places:
            mixed = _mixed(np.arange(size, dtype=np.uint64) + np.uint64(number << 32))
            self._places[kind] = torch.from_numpy(mixed.view(np.int64)).to(keys.device)
        return self._places[kind]


def sample_keys(seed: int, step: int, samples: np.ndarray) -> Tensor:
    """Return a key for each sample of a step, int64 (B,): all that its masks depend on.

    Args:
        seed: of the run.
        step: from 0.
        samples: numbers of the samples, int64 (B,).
    """
    base = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return torch.from_numpy(_mixed(samples.astype(np.uint64) + base).view(np.int64))


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Return 64 bits for each of some numbers, uint64, by SplitMix64: other numbers give unrelated bits."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(_FIRST)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_SECOND)
    result: np.ndarray = mixed ^ (mixed >> np.uint64(31))
    return result


def _signed(bits: int) -> int:
    """Return the int64 that has the same bits as an unsigned number."""
    return bits - 2**64 if bits >= 2**63 else bits
