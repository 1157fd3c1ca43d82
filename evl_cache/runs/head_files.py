"""The weights of trained heads: safetensors files that belong to a run's configuration."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from evl_cache.errors import WeightsError
from evl_cache.heads import Head
from evl_cache.runs.directory import BEST_NAME, HEAD_NAME, _publish, read_run_config
from evl_cache.untrusted.head_files import safetensors_shapes


def load_head(run: str | Path, *, best: bool = False) -> Head:
    """The trained head of a run directory, in eval mode on the CPU: the last one, or that of its best epoch.

    Raises: UsageError where there is no run; WeightsError where its weights do not belong to it.
    """
    run = Path(run)
    path = run / (BEST_NAME if best else HEAD_NAME)
    config, shapes = read_run_config(run), safetensors_shapes(path)
    with torch.device(
        "meta"
    ):  # of no memory: the file is as large as its tensors, the configuration may say anything
        own = {name: tuple(value.shape) for name, value in config.build().state_dict().items()}
    _check_shapes(own, shapes, source=path)
    head = config.build()
    head.load_state_dict(load_file(path))
    return head.eval()


def load_weights(head: Head, weights: Mapping[str, torch.Tensor], *, source: Path) -> None:
    """Raises: WeightsError where names or shapes are not the head's."""
    _check_shapes(
        {name: tuple(value.shape) for name, value in head.state_dict().items()},
        {name: tuple(value.shape) for name, value in weights.items()},
        source=source,
    )
    head.load_state_dict(weights)


def _check_shapes(
    own: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, source: Path
) -> None:
    wrong = [name for name in own.keys() | found.keys() if own.get(name) != found.get(name)]
    if wrong:
        raise WeightsError(
            f"{source}: does not belong to this head ({sorted(wrong)[:3]} missing, extra or misshapen)"
        )


def save_head(run: Path, head: Head, *, best: bool = False) -> None:
    """Write `head.safetensors`, or `best.safetensors`, whole or not at all."""
    name = BEST_NAME if best else HEAD_NAME
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    temporary = run / f".{name}.tmp"
    save_file(tensors, temporary)
    _publish(temporary, run / name)
