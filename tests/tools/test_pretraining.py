"""evl-tiny: captions that are true, a training that goes on after a stop, and what the shipped weights know."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from evl_cache.errors import WeightsError
from evl_cache.towers import build_tower
from tools.pretraining.model import contrastive_loss
from tools.pretraining.pictures import (
    ANY,
    COLUMN,
    RELATIONS,
    ROW,
    SIZES,
    Caption,
    caption_for,
    draw_pictures,
    is_true,
    things_on_patches,
)
from tools.pretraining.train import Options, train
from tools.pretraining.weights import load_weights, shipped
from tools.pretraining.zero_shot import zero_shot_accuracy

LARGEST = 12_000_000


@pytest.fixture(scope="module")
def pictures():
    return draw_pictures(np.random.default_rng(4), 24, side=32, levels=np.repeat([0, 1, 2, 3], 6))


def holds(caption: Caption, things: np.ndarray, places: np.ndarray, ground: np.ndarray) -> bool:
    """Whether a caption is true, thing by thing."""

    def fits(wanted, values) -> bool:
        return all(w in (ANY, v) for w, v in zip(wanted, values, strict=True))

    def related(a: int, b: int) -> bool:
        (dx, dy), name = places[a] - places[b], RELATIONS[caption.relation]
        sideways = abs(dx) > abs(dy)
        along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[name]
        return along > 0.15 and sideways == (name in ("left of", "right of"))

    present = [n for n in range(len(things)) if things[n, 0] != ANY]
    first = [n for n in present if fits(caption.first, things[n])]
    if caption.relation != ANY:
        second = [n for n in present if fits(caption.second, things[n])]
        first = [a for a in first if any(a != b and related(a, b) for b in second)]
    return bool(first) and fits(caption.ground, ground)


def test_captions_are_true_of_exactly_the_pictures_they_fit(pictures) -> None:
    rng = np.random.default_rng(0)
    own = [number for number in range(24) for _ in range(4)]
    captions = [caption_for(rng, pictures, number) for number in own]
    slow = [
        [holds(c, *parts) for parts in zip(pictures.things, pictures.places, pictures.grounds, strict=True)]
        for c in captions
    ]
    found = is_true(captions, pictures)
    assert np.array_equal(found, slow)
    assert found[np.arange(len(own)), own].all() and found.mean() < 0.5
    assert {c.relation for c in captions} == {ANY, 0, 1, 2, 3} and len(
        {" ".join(c.words()) for c in captions}
    ) > 80


def test_a_thing_lies_over_the_patches_that_its_disc_reaches(pictures) -> None:
    found, grid = things_on_patches(pictures, grid=6).reshape(24, 6, 6), 6
    for number in range(24):
        radii = [0.8 * list(SIZES.values())[size] for size in pictures.things[number, :, 3]]
        for row in range(grid):
            for column in range(grid):
                near = {}
                for n, (x, y) in enumerate(pictures.places[number]):
                    if pictures.things[number, n, 0] == ANY:
                        continue
                    dx = max(column / grid - x, 0, x - (column + 1) / grid)
                    dy = max(row / grid - y, 0, y - (row + 1) / grid)
                    near[n] = math.hypot(dx, dy) - radii[n]
                nearest = min(near, key=near.__getitem__)
                assert found[number, row, column] == (nearest if near[nearest] < 0 else ANY)
    # A thing's own cell, of three by three, is where it is said to be.
    row, column = pictures.things[0, 0, [ROW, COLUMN]]
    assert (found[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] == 0).any()


def test_what_is_true_of_another_picture_is_no_wrong_answer() -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    own = torch.tensor([0, 0, 1, 1, 2, 2])
    true = torch.zeros(6, 3, dtype=torch.bool)
    true[torch.arange(6), own] = True
    true[1, 2] = true[4, 0] = True
    of_texts, of_images = [], []
    for caption in range(6):
        mine = logits[caption, own[caption]].exp()
        wrong = sum(logits[caption, n].exp() for n in range(3) if not true[caption, n])
        of_texts.append(-(mine / (mine + wrong)).log())
        wrong = sum(logits[m, own[caption]].exp() for m in range(6) if not true[m, own[caption]])
        of_images.append(-(mine / (mine + wrong)).log())
    expected = 0.5 * (torch.stack(of_texts).mean() + torch.stack(of_images).mean())
    torch.testing.assert_close(contrastive_loss(logits, own, true), expected)


def test_a_stopped_training_ends_with_the_same_bytes(tmp_path: Path) -> None:
    options = Options(steps=4, batch=4, warmup_steps=2)
    whole = list(train(options, tmp_path / "whole", every=2, held_out=8))
    stopped = train(options, tmp_path / "stopped", every=2, held_out=8)
    assert [next(stopped)["step"], next(stopped)["step"]] == [0, 2]
    stopped.close()
    state = torch.load(tmp_path / "stopped" / "last.pt", weights_only=True)
    assert state["step"] == 2 and not (tmp_path / "stopped" / "evl-tiny.safetensors").exists()
    rest = list(train(options, tmp_path / "stopped", every=2, held_out=8))
    assert [line["step"] for line in (*whole, *rest)] == [0, 2, 4, 4]
    assert rest[-1]["zero_shot"] == whole[-1]["zero_shot"]
    files = [(tmp_path / name / "evl-tiny.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1] and len(files[0]) <= LARGEST
    with pytest.raises(SystemExit, match="other options"):
        next(train(Options(steps=4, batch=4, lr=1e-3), tmp_path / "stopped", every=2, held_out=8))


def test_the_shipped_weights_tell_what_a_picture_shows() -> None:
    torch.set_num_threads(1)
    scores = zero_shot_accuracy(load_weights(shipped()), pictures=256, side=96, seed=7)
    floors = {"shape": 70, "colour": 95, "texture": 80, "size": 85, "position": 90, "ground colour": 90}
    assert {name for name, floor in floors.items() if scores[name][0] < floor} == set(), scores


def test_the_shipped_weights_are_those_of_the_configuration_and_the_docs() -> None:
    content = shipped().read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    config = json.loads(shipped().with_suffix(".json").read_text(encoding="utf-8"))
    docs = Path(__file__).resolve().parents[2] / "docs" / "evl-tiny.md"
    assert (
        len(content) <= LARGEST
        and config["weights_sha256"] == sha256
        and sha256 in docs.read_text(encoding="utf-8")
    )


def test_the_tower_by_name_is_the_pretrained_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visual, spec = build_tower("evl-tiny", "rendered-v1")
    assert (spec.model, spec.pretrained, spec.image_size, spec.blocks) == ("evl-tiny", "rendered-v1", 96, 8)
    model = load_weights(shipped())
    for name, value in visual.state_dict().items():
        assert torch.equal(value, model.visual.state_dict()[name])
    _, from_file = build_tower("evl-tiny", str(shipped()))
    assert (
        from_file.weights_sha256 == spec.weights_sha256 != build_tower("evl-tiny", "none")[1].weights_sha256
    )
    with pytest.raises(WeightsError, match="neither a file nor a tag of evl-tiny; expected rendered-v1"):
        build_tower("evl-tiny", "openai")
    damaged = bytearray(shipped().read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "evl-tiny.safetensors").write_bytes(damaged)
    monkeypatch.setattr("evl_cache.towers.pretrained.bundled", lambda name: tmp_path / name)
    with pytest.raises(WeightsError, match=r"sha256 is .* install evl-cache again"):
        build_tower("evl-tiny", "rendered-v1")
