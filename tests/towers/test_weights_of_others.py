"""Two towers in one file of weights, one by the names of its authors."""

import sys
from pathlib import Path

import pytest
import torch

from evl_cache.errors import WeightsError
from evl_cache.towers import build_tower

State = dict[str, torch.Tensor]


def behind(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def refused(model: str, state: object, path: Path) -> str:
    torch.save(state, path)
    with pytest.raises(WeightsError) as raised:
        build_tower(model, str(path))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_second_tower_by_its_authors_names_is_refused_naming_both(tmp_path, monkeypatch):
    name = "timm/vit_tiny_patch16_224@64"
    visual, spec = build_tower(name, "none")

    def authors(state: State, model: object) -> State:
        return {n.replace("layers.", "blocks."): value for n, value in state.items()}

    monkeypatch.setattr(sys.modules[type(visual).__module__], "checkpoint_filter_fn", authors)
    state = dict(visual.state_dict())
    theirs = {n.replace("blocks.", "layers."): value + 1 for n, value in state.items()}
    told = refused(name, {**behind("student.", state), **behind("teacher.", theirs)}, tmp_path / "w.pt")
    assert "2 towers that fit and differ: 'student.' and 'teacher.'" in told
    equal = {n.replace("blocks.", "layers."): value for n, value in state.items()}
    torch.save({**behind("student.", state), **behind("teacher.", equal)}, tmp_path / "w.pt")
    assert build_tower(name, str(tmp_path / "w.pt")).spec.weights_sha256 == spec.weights_sha256
