"""The optimiser of a run: AdamW, its learning rate, clipping, and the parameters' moving average.

The published recipe is AdamW that decays everything, cosine to zero (arXiv 2208.03550, section 4).
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from evl_cache.heads import Head, sample_keys
from evl_cache.runs import HeadInputs, extremes, head_logits
from evl_cache.train.options import TrainOptions

LEAST_SCALE = 2.0**-20  # of float16 losses; torch begins with 2 ** 16, and halves it where gradients overflow
_KERNELS = ("fused", "foreach", "capturable")  # how AdamW computes; a part of its groups


class Optimisation:
    """Everything that changes a head's parameters from step to step. On a GPU none of it waits for the device.

    Args:
        head: on its device.
        options: of the run.
        total_steps: of the run; the schedule ends there.

    Attributes:
        averaged: a head of the parameters' moving averages, or None.
    """

    def __init__(self, head: Head, options: TrainOptions, *, total_steps: int) -> None:
        self.head, self.options, self.total_steps = head, options, total_steps
        self.optimizer = torch.optim.AdamW(
            parameter_groups(
                head, options.weight_decay, decay_norms_and_biases=options.decay_norms_and_biases
            ),
            lr=options.lr,
            fused=takes_fused(head),
        )
        device = next(head.parameters()).device.type
        # Only float16's range needs it; disabled it does nothing.
        self.scaler = torch.amp.GradScaler(device, enabled=options.precision == "float16")
        self.averaged = None if options.ema is None else copy.deepcopy(head).requires_grad_(False)

    @property
    def result(self) -> Head:
        """The head that is validated and saved."""
        return self.head if self.averaged is None else self.averaged

    def begin(self, step: int) -> None:
        """Set the learning rate of a step (counted from 0) and clear the gradients, before its passes."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a part of the step."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def finish(self, step: int) -> None:
        """Change the parameters by the gradients that were added up."""
        if self.options.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.head.parameters(), self.options.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None and self.options.ema is not None:
            # Early averages would be mostly of the start: the decay grows to its value, as is usual.
            decay = min(self.options.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                mine, theirs = tuple(self.averaged.parameters()), tuple(self.head.parameters())
                torch._foreach_lerp_(mine, theirs, 1 - decay)

    @property
    def overflows(self) -> bool:
        """Whether float16 has no room for gradients at any scale: steps are left out, and nothing is learnt. Waits."""
        return self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE

    @torch.no_grad()
    def health(self, proof: HeadInputs | None) -> torch.Tensor:
        """Return the largest magnitude of the parameters, as `extremes` does; nothing waits for the device.

        Args:
            proof: logits of this count too: parameters of 1e30 are numbers, and a state of them is worth nothing.
        """
        values: list[torch.Tensor] = list(self.head.parameters())
        if proof is None:
            return extremes(values)
        was_training = self.head.training
        logits = head_logits(self.head.eval(), proof, self.options.precision)
        self.head.train(was_training)
        return extremes([*values, logits])

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        return self.options.lr * lr_factor(step, warmup=self.options.warmup_steps, total=self.total_steps)

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "head": self.head.state_dict(),
            "ema": None if self.averaged is None else self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.head.load_state_dict(state["head"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["ema"])
        # A state also names the kernels that it was made with; these are chosen anew, for this device.
        own = [{name: group[name] for name in _KERNELS} for group in self.optimizer.param_groups]
        saved = state["optimizer"]
        groups = [{**group, **kernels} for group, kernels in zip(saved["param_groups"], own, strict=True)]
        self.optimizer.load_state_dict({**saved, "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])


def takes_fused(head: nn.Module) -> bool | None:
    """Whether AdamW runs as one kernel over all parameters: on a GPU; None leaves it to torch.

    With a gradient scaler the kernel itself leaves out a step whose gradients are infinite, where the host would wait to
    know. On a CPU torch's own choice stays: its results differ in the last bit.
    """
    on_gpu = all(p.is_cuda and p.is_floating_point() for p in head.parameters())
    return True if on_gpu else None


def lr_factor(step: int, *, warmup: int, total: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then cosine to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def parameter_groups(
    head: nn.Module, weight_decay: float, *, decay_norms_and_biases: bool
) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: one that decays, as published, or another without decay for norms and biases."""
    free: list[nn.Parameter] = []
    if not decay_norms_and_biases:
        for module in head.modules():
            is_norm = isinstance(module, nn.LayerNorm)
            own = module.named_parameters(recurse=False)
            free += [parameter for name, parameter in own if is_norm or name == "bias"]
    names = {id(parameter) for parameter in free}
    groups = [{"params": [p for p in head.parameters() if id(p) not in names], "weight_decay": weight_decay}]
    return groups + ([{"params": free, "weight_decay": 0.0}] if free else [])


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """How far torch's generators have come, of the CPU and of one device.

    Attributes:
        device: whose generator it is, beside the CPU's.
        cpu, gpu: the states; no other is there for a CPU.
    """

    device: torch.device
    cpu: torch.Tensor
    gpu: torch.Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> "RandomState":
        """Return the state now. The device is not waited for."""
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device=device, cpu=torch.get_rng_state(), gpu=gpu)

    def restore(self) -> None:
        """Have the generators go on from here."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)


@dataclass(frozen=True, kw_only=True)
class StepRandom:
    """What is random in a step. Nothing is kept of it, so a continued run draws what an uninterrupted one would.

    Attributes:
        seed: of the run.
        step: from 0.
        rank: of this process.
    """

    seed: int
    step: int
    rank: int

    def keys(self, samples: np.ndarray) -> torch.Tensor:
        """Return keys of samples (rows of the cache, int64 (B,)) for their masks of dropout, the same in any process."""
        return sample_keys(self.seed, self.step, samples)

    def begin(self) -> None:
        """Seed torch's generators, for whatever else a head draws: that depends on the process."""
        seed_step(self.seed, self.step, self.rank)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators from the run's seed, the step and the rank."""
    drawn = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(drawn) >> 1)
