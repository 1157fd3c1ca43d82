"""Ours against numbers from the official implementation (tests/fixtures/evl_reference)."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evl_cache import Backbone, EVLHead, adjacent_frame_maps, load_official_checkpoint
from evl_cache.quantize import quantize_maps, quantize_tokens

FIXTURE = Path(__file__).parents[1] / "fixtures" / "evl_reference"
MODULES = ("temporal_conv", "temporal_pos_embed", "temporal_cross_attention")
LAYERS = (3, 4, 5, 6)


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(FIXTURE / "reference.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def features(reference):
    from open_clip.transformer import QuickGELU, VisionTransformer

    config = json.loads((FIXTURE / "config.json").read_text())
    visual = VisionTransformer(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        width=config["width"],
        layers=config["layers"],
        heads=config["heads"],
        mlp_ratio=config["mlp_ratio"],
        output_dim=config["embed_dim"],
        act_layer=QuickGELU,
    )
    visual.load_state_dict(load_file(FIXTURE / "backbone_visual.safetensors"))
    return Backbone(visual, layers=range(1, 7))(torch.from_numpy(reference["frames"]))


@pytest.fixture
def inputs(reference):
    """Tokens and maps as the official backbone gave them."""
    tokens = [torch.from_numpy(reference[f"out_{layer}"]) for layer in LAYERS]
    maps = [
        torch.from_numpy(np.stack([reference[f"map_prev_{layer}"], reference[f"map_next_{layer}"]], axis=1))
        for layer in LAYERS
    ]
    return tokens, maps


def official_head() -> EVLHead:
    return load_official_checkpoint(FIXTURE / "official_layout_checkpoint.pth", dropout=0.0)


def test_tokens_equal_the_official_backbones(reference, features):
    for layer in range(1, 7):
        np.testing.assert_allclose(
            features.tokens[layer].numpy(), reference[f"out_{layer}"], rtol=0, atol=2e-4
        )


def test_maps_equal_the_official_ones(reference, features):
    for layer in LAYERS:
        maps = features.maps[layer].numpy()
        np.testing.assert_allclose(maps[:, 0], reference[f"map_prev_{layer}"], rtol=0, atol=2e-5)
        np.testing.assert_allclose(maps[:, 1], reference[f"map_next_{layer}"], rtol=0, atol=2e-5)


def test_maps_of_official_queries_and_keys(reference):
    for layer in LAYERS:
        q, k = (torch.from_numpy(reference[f"{name}_{layer}"]) for name in "qk")
        expected = np.stack([reference[f"map_prev_{layer}"], reference[f"map_next_{layer}"]], axis=1)
        np.testing.assert_allclose(adjacent_frame_maps(q, k).numpy(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("without", [None, *MODULES])
def test_logits_equal_the_official_ones(reference, inputs, without):
    head = official_head()
    if without is not None:
        setattr(head, without, False)
    expected = reference["logits" if without is None else f"logits_without_{without}"]
    with torch.no_grad():
        np.testing.assert_allclose(head(*inputs).numpy(), expected, rtol=0, atol=1e-4)


def test_logits_from_our_own_features_equal_the_official_ones(reference, features):
    tokens = [features.tokens[layer] for layer in LAYERS]
    maps = [features.maps[layer] for layer in LAYERS]
    with torch.no_grad():
        logits = official_head()(tokens, maps)
    np.testing.assert_allclose(logits.numpy(), reference["logits"], rtol=0, atol=1e-4)


def test_gradient_norms_equal_the_official_ones(reference, inputs):
    head = official_head().train()
    labels = torch.from_numpy(reference["labels"])
    torch.nn.functional.cross_entropy(head(*inputs), labels).backward()
    norms = {name: float(p.grad.norm()) for name, p in head.named_parameters() if p.grad is not None}
    expected = {_our_name(name): value for name, value in _official_gradient_norms(reference).items()}
    assert expected.keys() == {name for name, _ in head.named_parameters()}
    for name, value in expected.items():
        # A gradient that is zero in theory (the key bias) may be left out altogether.
        assert math.isclose(norms.get(name, 0.0), value, rel_tol=1e-3, abs_tol=1e-6), name


def test_twelve_training_losses_equal_the_official_ones(reference, inputs):
    head = official_head().train()
    labels = torch.from_numpy(reference["labels"])
    optimizer = torch.optim.AdamW(head.parameters(), lr=4e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(*inputs), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    np.testing.assert_allclose(losses, reference["train_losses"], rtol=0, atol=1e-3)
    with torch.no_grad():
        logits = head.eval()(*inputs).numpy()
    np.testing.assert_allclose(logits, reference["logits_after_training"], rtol=0, atol=2e-3)


def _official_gradient_norms(reference) -> dict[str, float]:
    return json.loads(reference["grad_norms_json"].tobytes())


def _our_name(name: str) -> str:
    from evl_cache.runs.official_checkpoint import our_name

    found = our_name(name.removeprefix("module."))
    assert found is not None, name
    return found


def test_quantised_features_move_the_official_logits_by_less_than_a_percent(reference, inputs):
    tokens, maps = inputs
    with torch.no_grad():
        logits = official_head()(
            [quantize_tokens(t) for t in tokens], [quantize_maps(m) for m in maps]
        ).numpy()
    expected = reference["logits"]
    assert np.linalg.norm(logits - expected) < 0.01 * np.linalg.norm(expected)
    assert (logits.argmax(axis=1) == expected.argmax(axis=1)).all()
