"""The frozen tower: tokens against open_clip's own forward pass, queries and keys against a hook that projects again."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.transformer import LayerNormFp32, QuickGELU, VisionTransformer
from torch import nn

from evl_cache import Backbone, adjacent_frame_maps
from evl_cache.errors import UsageError
from evl_cache.towers import build_tower, map_projections
from evl_cache.towers.frozen_twin import frozen_twin

CONFIG = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 5, "head_width": 16, "mlp_ratio": 2.0}


def tower(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {
        "image_size": 32,
        "patch_size": 8,
        "width": 48,
        "layers": 5,
        "heads": 3,
        "mlp_ratio": 2.0,
        "output_dim": 20,
    }
    return VisionTransformer(**(sizes | changes)).eval()


def clip_frames(batch=2, frames=3, size=32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, frames, 3, size, size, generator=generator)


VARIANTS = {
    "plain": {},
    "quick_gelu": {"act_layer": QuickGELU},
    "layer_scale": {"ls_init_value": 0.3},
    "no_ln_pre": {"no_ln_pre": True},
    "sin_cos_positions": {"pos_embed_type": "sin_cos_2d"},
    "patch_dropout": {"patch_dropout": 0.5},
    "average_pool": {"pool_type": "avg", "final_ln_after_pool": True},
    "fp32_norms": {"norm_layer": LayerNormFp32},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_equal_open_clips_own_forward_pass(variant):
    visual, frames = tower(**VARIANTS[variant]), clip_frames()
    found = Backbone(visual, layers=(1, 2, 3, 4, 5))(frames)
    with torch.no_grad():
        theirs = visual.forward_intermediates(
            frames.flatten(0, 1), output_fmt="NLC", output_extra_tokens=True
        )
    for i in range(5):
        expected = torch.cat(
            [theirs["image_intermediates_prefix"][i], theirs["image_intermediates"][i]], dim=1
        ).unflatten(0, (2, 3))
        torch.testing.assert_close(found.tokens[i + 1], expected, atol=2e-5, rtol=0)


def slow_queries_and_keys(visual, frames, layer):
    """The published way: watch what enters the block, normalise it, project it again."""
    entered = []
    hook = visual.transformer.resblocks[layer - 1].register_forward_pre_hook(
        lambda module, args: entered.append(args[0])
    )
    with torch.no_grad():
        visual(frames.flatten(0, 1))
    hook.remove()
    block = visual.transformer.resblocks[layer - 1]
    width, heads = block.attn.embed_dim, block.attn.num_heads
    with torch.no_grad():
        normed = block.ln_1(entered[0])
        q = F.linear(normed, block.attn.in_proj_weight[:width], block.attn.in_proj_bias[:width])
        k = F.linear(
            normed, block.attn.in_proj_weight[width : 2 * width], block.attn.in_proj_bias[width : 2 * width]
        )
    shape = (*frames.shape[:2], q.shape[1], heads, width // heads)
    return q.view(shape), k.view(shape)


@pytest.mark.parametrize("layer", [1, 3, 5])
def test_maps_are_made_from_the_queries_and_keys_of_the_same_block(layer):
    visual, frames = tower(), clip_frames(frames=4)
    with torch.no_grad():  # biases that are zero would hide that they are forgotten
        for block in visual.transformer.resblocks:
            block.attn.in_proj_bias.normal_()
    q, k = slow_queries_and_keys(visual, frames, layer)
    found = Backbone(visual, layers=(layer,))(frames)
    torch.testing.assert_close(found.maps[layer], adjacent_frame_maps(q, k), atol=1e-6, rtol=0)


def test_maps_equal_a_loop_over_heads_and_patches():
    generator = torch.Generator().manual_seed(2)
    B, T, P, H, D = 2, 3, 4, 2, 5
    q = 2 * torch.randn(B, T, 1 + P, H, D, generator=generator)
    k = 2 * torch.randn(B, T, 1 + P, H, D, generator=generator)
    found = adjacent_frame_maps(q, k)
    assert found.shape == (B, 2, T - 1, P, P)
    for b in range(B):
        for t in range(T - 1):
            for direction, (queries, keys) in enumerate(((t + 1, t), (t, t + 1))):  # prev, next
                for i in range(P):
                    row = torch.zeros(P)
                    for h in range(H):
                        scores = [
                            float(q[b, queries, 1 + i, h] @ k[b, keys, 1 + j, h]) * D**-0.5 for j in range(P)
                        ]
                        row += torch.softmax(torch.tensor(scores), dim=0) / H
                    torch.testing.assert_close(found[b, direction, t, i], row, atol=1e-5, rtol=0)


def test_maps_of_one_frame_or_of_unequal_tensors_are_refused():
    q = torch.zeros(1, 1, 5, 2, 4)
    with pytest.raises(UsageError, match="at least 2 frames"):
        adjacent_frame_maps(q, q)
    with pytest.raises(UsageError, match=r"expected the same"):
        adjacent_frame_maps(torch.zeros(1, 2, 5, 2, 4), torch.zeros(1, 3, 5, 2, 4))


def test_nothing_runs_after_the_last_block_needed():
    visual = tower()
    calls = []
    for number, block in enumerate(visual.transformer.resblocks, start=1):
        block.ln_1.register_forward_hook(lambda module, args, out, number=number: calls.append(number))
    visual.ln_post.register_forward_hook(lambda module, args, out: calls.append("ln_post"))
    found = Backbone(visual, layers=(3, 1))(clip_frames())
    assert calls == [1, 2, 3]
    assert list(found.tokens) == [1, 3] and list(found.maps) == [1, 3]


def test_the_tower_is_frozen_and_stays_in_eval_mode():
    visual = tower(patch_dropout=0.5).train()
    visual.requires_grad_(True)
    backbone = Backbone(visual, layers=(2,))
    before = backbone(clip_frames()).tokens[2]
    assert backbone.train() is backbone
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    after = backbone(clip_frames().requires_grad_()).tokens[2]
    assert torch.equal(before, after) and not after.requires_grad


def as_it_is(module):
    """Everything of a module that freezing it could change."""
    parameters = [(name, p, p.requires_grad, p.data_ptr(), p.dtype) for name, p in module.named_parameters()]
    state = {name: value.clone() for name, value in module.state_dict().items()}
    flags = {
        name: {k: v for k, v in part.__dict__.items() if isinstance(v, bool | int | float | str)}
        for name, part in module.named_modules()
    }
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]
    return parameters, state, flags, hooks


@pytest.mark.parametrize("family", ["open_clip", "timm"])
@pytest.mark.parametrize("is_training", [True, False])
def test_the_callers_tower_stays_as_it_is(family, is_training):
    if family == "timm":
        visual = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0, depth=4)
        visual.blocks[1].attn.fused_attn = False
    else:
        visual = tower(patch_dropout=0.5)
    visual.train(is_training).requires_grad_(is_training)
    visual.get_parameter("conv1.weight" if family == "open_clip" else "pos_embed").requires_grad_(
        not is_training
    )
    before = as_it_is(visual)
    backbone = Backbone(visual, layers=(2, 3))
    backbone(clip_frames())
    backbone.to(torch.bfloat16)(clip_frames())
    map_projections(visual, (2,), compute_dtype=torch.float32)
    after = as_it_is(visual)
    assert [p[0] for p in after[0]] == [p[0] for p in before[0]]
    assert all(a[1] is b[1] and a[2:] == b[2:] for a, b in zip(after[0], before[0], strict=True))
    assert all(torch.equal(after[1][name], value) for name, value in before[1].items())
    assert after[2:] == before[2:]
    assert all(p.grad is None for p in visual.parameters())


def test_the_backbone_shares_the_towers_memory_until_it_is_moved():
    visual = tower()
    backbone = Backbone(visual, layers=(2,))
    own = {name: p.data_ptr() for name, p in visual.named_parameters()}
    assert {name: p.data_ptr() for name, p in backbone.visual.named_parameters()} == own
    before = backbone(clip_frames()).tokens[2]
    with torch.no_grad():
        visual.conv1.weight.mul_(2)
    assert not torch.equal(backbone(clip_frames()).tokens[2], before)
    assert next(backbone.double().parameters()).dtype == torch.float64
    assert next(visual.parameters()).dtype == torch.float32


def test_modules_and_weights_that_are_used_twice_are_one_in_the_twin():
    shared = nn.Linear(3, 3)
    other = nn.Linear(3, 3)
    other.weight = shared.weight
    twin = frozen_twin(nn.ModuleList([shared, shared, other]))
    assert twin[0] is twin[1] and twin[0] is not shared
    assert twin[2].weight is twin[0].weight and twin[2].weight is not shared.weight


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 2, 3, 32, 32, dtype=torch.int64),
        torch.zeros(1, 2, 3, 32, 32, dtype=torch.bool),
        np.zeros((1, 2, 3, 32, 32), dtype=np.uint8),
        [[0.0]],
    ],
    ids=lambda frames: str(getattr(frames, "dtype", "list")),
)
def test_frames_that_are_not_normalised_numbers_are_refused(frames):
    with pytest.raises(
        UsageError, match=r"^frames are \w+; expected a floating tensor, normalised .*preprocess"
    ):
        Backbone(tower(), layers=(1,))(frames)


def test_frames_are_not_changed():
    frames = clip_frames()
    kept = frames.clone()
    Backbone(tower(), layers=(5,))(frames)
    assert torch.equal(frames, kept)


def test_a_single_frame_has_tokens_and_no_maps():
    found = Backbone(tower(), layers=(2, 3))(clip_frames(frames=1))
    assert found.maps == {} and found.tokens[3].shape == (2, 1, 17, 48)


def test_maps_are_left_out_where_they_are_not_asked_for():
    assert Backbone(tower(), layers=(2,), with_maps=False)(clip_frames()).maps == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same(dtype):
    exact = Backbone(tower(), layers=(4,))(clip_frames())
    half = Backbone(tower().to(dtype), layers=(4,))(clip_frames())
    assert half.tokens[4].dtype == half.maps[4].dtype == dtype
    error = (half.tokens[4].float() - exact.tokens[4]).norm() / exact.tokens[4].norm()
    assert 0 < error < 0.02
    torch.testing.assert_close(half.maps[4].float().sum(-1), torch.ones(2, 2, 2, 16), atol=0.02, rtol=0)


def test_layers_out_of_range_name_the_blocks_there_are():
    for layers in ((0,), (6,), (), (-1, 2)):
        with pytest.raises(UsageError, match="layers 1 to 5"):
            Backbone(tower(), layers=layers)


def test_frames_of_another_size_are_refused():
    backbone = Backbone(tower(), layers=(1,))
    for frames in (torch.zeros(1, 2, 3, 40, 40), torch.zeros(2, 3, 32, 32), torch.zeros(1, 2, 1, 32, 32)):
        with pytest.raises(UsageError, match=r"expects \(B, T, 3, 32, 32\)"):
            backbone(frames)


def test_a_resnet_tower_is_refused_by_name():
    from open_clip.modified_resnet import ModifiedResNet

    resnet = ModifiedResNet(layers=[1, 1, 1, 1], output_dim=8, heads=2, image_size=32, width=8)
    with pytest.raises(UsageError, match=r"is a ModifiedResNet; expected an open_clip VisionTransformer"):
        Backbone(resnet, layers=(1,))


def test_custom_blocks_are_refused_by_name():
    with pytest.raises(UsageError, match="CustomResidualAttentionBlock"):
        Backbone(tower(qk_norm=True), layers=(1,))


def write_config(path: Path, vision: dict, **more) -> str:
    path.write_text(json.dumps({"embed_dim": 20, "vision_cfg": vision, **more}))
    return str(path)


def test_build_tower_refuses_resnet_windowed_and_custom_towers(tmp_path):
    cases = {
        "ModifiedResNet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
        "timm's SwinTransformer": {"timm_model_name": "swin_tiny_patch4_window7_224", "image_size": 224},
        "CustomResidualAttentionBlock": {**CONFIG, "qk_norm": True},
    }
    for name, vision in cases.items():
        with pytest.raises(UsageError, match=name):
            build_tower(write_config(tmp_path / "model.json", vision), "none")


def test_random_towers_are_the_same_every_time_and_leave_the_random_state_alone(tmp_path):
    model = write_config(tmp_path / "tiny.json", CONFIG)
    torch.manual_seed(7)
    first, spec = build_tower(model, "none")
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    torch.manual_seed(99)
    second, again = build_tower(model, "none")
    assert spec == again
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_spec_says_what_the_tower_is(tmp_path):
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    model = write_config(tmp_path / "tiny.json", CONFIG, quick_gelu=True, preprocess_cfg=preprocess)
    visual, spec = build_tower(model, "none")
    assert (spec.model, spec.pretrained) == ("tiny", "none")
    assert (spec.image_size, spec.patch_size, spec.width, spec.blocks, spec.heads) == (32, 8, 48, 5, 3)
    assert spec.grid == (4, 4) and spec.quick_gelu
    assert spec.mean == (0.1, 0.2, 0.3) and spec.std == (0.5, 0.6, 0.7)
    assert isinstance(visual.transformer.resblocks[0].mlp.gelu, QuickGELU)


def test_an_unknown_model_lists_some():
    with pytest.raises(UsageError, match=r"unknown model 'ViT-B-17'; expected an open_clip name \(ViT-B-"):
        build_tower("ViT-B-17", "none")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"embed_dim": 8}',
        '{"embed_dim": 8, "vision_cfg": 3}',
        '{"embed_dim": 8, "vision_cfg": {"layerz": 3}}',
        '{"embed_dim": 8, "vision_cfg": {"patch_size": 0, "layers": 1, "width": 64}}',
        '{"embed_dim": 8, "vision_cfg": {"width": 70, "head_width": 16, "layers": 1}}',
        '{"embed_dim": 8, "vision_cfg": {"layers": 1, "width": 64}, "preprocess_cfg": {"mean": [0.5]}}',
        '{"embed_dim": 8, "vision_cfg": {"image_size": [32, 64], "width": 64, "layers": 1}}',
    ],
)
def test_a_broken_model_file_is_a_usage_error_in_one_line(tmp_path, content):
    path = tmp_path / "model.json"
    path.write_text(content)
    with pytest.raises(UsageError, match="model") as raised:
        build_tower(str(path), "none")
    assert "\n" not in str(raised.value).strip()


def test_a_missing_model_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        build_tower(str(tmp_path / "nothing.json"), "none")
