"""evl-tiny as a file: both towers in float16, so that zero-shot accuracy can be measured again from what is shipped."""

import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tools.pretraining.model import Pretraining

KEPT = ("visual.", "text.", "log_scale")  # the attribute heads are thrown away


def save_weights(model: Pretraining, path: Path, *, options: Any) -> None:
    """Write both towers; `options` (a dataclass) goes into the file's metadata."""
    state = model.state_dict()
    kept = {name: value.half().contiguous() for name, value in state.items() if name.startswith(KEPT)}
    save_file(kept, path, metadata={"options": json.dumps(asdict(options), sort_keys=True)})


def load_weights(path: Path) -> Pretraining:
    """The two towers of a file in float32; the attribute heads are untrained."""
    model = Pretraining()
    missing, unexpected = model.load_state_dict(
        {name: value.float() for name, value in load_file(path).items()}, strict=False
    )
    assert not unexpected and not any(name.startswith(KEPT) for name in missing), (missing, unexpected)
    return model


def shipped() -> Path:
    """The weights that come with the package."""
    return Path(str(files("evl_cache") / "data" / "evl-tiny.safetensors"))


def untrained(seed: int) -> Pretraining:
    """What the training of a seed began from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Pretraining()
