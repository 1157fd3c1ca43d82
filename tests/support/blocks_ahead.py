"""A device whose batches are noted and tampered with, and extraction of a small list in batches of a given size."""

from pathlib import Path
from typing import Any

import pytest
import torch

from evl_cache.clips import ClipList
from evl_cache.extract import ExtractOptions, ExtractResult, extract
from evl_cache.towers import Backbone, Features
from tests.support.store_helpers import one_thread, small_job


class Device:
    """Notes the batches that the tower runs, and does what a test says before each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        self.before = lambda frames: None
        self.after = lambda features: features
        forward = Backbone.forward

        def noted(backbone: Backbone, frames: torch.Tensor) -> Features:
            self.before(frames)
            self.batches.append(len(frames))
            return self.after(forward(backbone, frames))

        monkeypatch.setattr(Backbone, "forward", noted)


def extract_in(
    batch: int, clips: ClipList, cache: Path, **options: Any
) -> tuple[ExtractResult, list[bool], list[str]]:
    """Return the result, what `on_clip` was told, and the lines of outages."""
    outages: list[str] = []
    told: list[bool] = []
    with one_thread():
        result = extract(
            small_job(clips, cache, spec=options.pop("spec", None)),
            options=ExtractOptions(batch=batch, decode_workers=1, **options),
            on_clip=told.append,
            on_outage=outages.append,
        )
    return result, told, outages


def overflown(features: Features, slots: slice) -> Features:
    for tokens in features.tokens.values():
        tokens[slots, 0, 0, 0] = torch.inf
    return features
