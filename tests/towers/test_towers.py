"""Towers beyond CLIP's own: tokens, queries and keys against hooks on the library's modules, at every family."""

import json
from itertools import pairwise

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from evl_cache import Backbone, adjacent_frame_maps
from evl_cache.attention_maps import maps_from_tokens
from evl_cache.errors import UsageError, WeightsError, WeightsUnavailable
from evl_cache.towers import adapter_of, build_tower
from evl_cache.towers.backbone import map_projections
from evl_cache.towers.names import default_pretrained

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 0}
# name -> (timm's name, changes, tokens before the patches, has a class token)
FAMILIES = {
    "SigLIP 2": ("vit_base_patch16_siglip_224.v2_webli", {}, 0, False),
    "DINOv2": ("vit_base_patch14_dinov2", {}, 1, True),
    "DINOv2 with registers": ("vit_base_patch14_reg4_dinov2", {}, 5, True),
    "EVA-02": ("eva02_base_patch14_224", {}, 1, True),
    "EVA-02-CLIP": ("eva02_base_patch16_clip_224", {}, 1, True),
    "PE-Core": ("vit_pe_core_base_patch16_224", {}, 1, True),
    "DINOv3": ("vit_base_patch16_dinov3", {"qkv_bias": True}, 5, True),
    "registers alone": ("vit_base_patch16_siglip_224", {"reg_tokens": 2}, 2, False),
    "norms of queries and keys": ("vit_base_patch16_224", {"qk_norm": True}, 1, True),
}
MAX_ERROR = 2e-5


def small(family: str) -> torch.nn.Module:
    """A random tower of the family's own class; nothing in it is zero or one by default."""
    name, changes, _, _ = FAMILIES[family]
    torch.manual_seed(0)
    visual = timm.create_model(name, pretrained=False, **SMALL | changes).eval()
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return visual


def clip_frames(batch: int = 2, frames: int = 3) -> torch.Tensor:
    return torch.randn(batch, frames, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def watch(visual: torch.nn.Module, frames: torch.Tensor, layer: int):
    """What leaves the block and what enters its attention, in the library's own forward pass."""
    block, seen = visual.blocks[layer - 1], {}
    hooks = [
        block.register_forward_hook(lambda module, args, out: seen.update(tokens=out)),
        block.attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(x=args[0], rope=kwargs.get("rope")), with_kwargs=True
        ),
    ]
    with torch.no_grad():
        visual(frames.flatten(0, 1))
    for hook in hooks:
        hook.remove()
    return seen["tokens"], seen["x"], seen["rope"]


def turn(x: torch.Tensor, rope: torch.Tensor, *, half: bool) -> torch.Tensor:
    """x (..., P, D) turned by angles whose sines and cosines are side by side in rope (P, 2D)."""
    sine, cosine = rope.chunk(2, dim=-1)
    out = torch.empty_like(x)
    width = x.shape[-1]
    pairs = [(i, i + width // 2) for i in range(width // 2)] if half else list(pairwise(range(width)))[::2]
    for first, second in pairs:
        out[..., first] = x[..., first] * cosine[..., first] - x[..., second] * sine[..., first]
        out[..., second] = x[..., second] * cosine[..., second] + x[..., first] * sine[..., second]
    return out


def slow_queries_and_keys(visual: torch.nn.Module, frames: torch.Tensor, layer: int, prefix: int):
    """The obvious way, from the tensor that enters the attention: project, norm, turn by position."""
    _, x, rope = watch(visual, frames, layer)
    attn = visual.blocks[layer - 1].attn
    with torch.no_grad():
        if attn.qkv is None:
            q, k = attn.q_proj(x), attn.k_proj(x)
        else:
            width = attn.qkv.weight.shape[0] // 3
            q, k = (F.linear(x, attn.qkv.weight[i * width : (i + 1) * width]) for i in (0, 1))
            if attn.qkv.bias is not None:
                q, k = q + attn.qkv.bias[:width], k + attn.qkv.bias[width : 2 * width]
            if getattr(attn, "q_bias", None) is not None:
                q = q + attn.q_bias  # keys have none
        q, k = (attn_norm(v.unflatten(2, (3, 16))) for attn_norm, v in ((attn.q_norm, q), (attn.k_norm, k)))
    q, k = (v.transpose(1, 2)[:, :, prefix:] for v in (q, k))  # (S,H,P,D)
    if rope is not None:
        q, k = (turn(v, rope, half=attn.rotate_half) for v in (q, k))
    shape = (*frames.shape[:2], 16, 3, 16)
    return q.transpose(1, 2).reshape(shape), k.transpose(1, 2).reshape(shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_that_leave_the_blocks(family):
    visual, frames = small(family), clip_frames()
    _, _, prefix, has_class_token = FAMILIES[family]
    found = Backbone(visual, layers=(1, 3, 4))(frames)
    for layer in (1, 3, 4):
        tokens = watch(visual, frames, layer)[0].unflatten(0, (2, 3))
        patches = tokens[:, :, prefix:]
        first = tokens[:, :, :1] if has_class_token else patches.mean(2, keepdim=True)
        expected = torch.cat([first, patches], dim=2)
        assert found.tokens[layer].shape == (2, 3, 17, 48)
        torch.testing.assert_close(found.tokens[layer], expected, atol=MAX_ERROR, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_made_from_the_queries_and_keys_of_the_same_block(family):
    visual, frames = small(family), clip_frames()
    found = Backbone(visual, layers=(2, 4))(frames)
    for layer in (2, 4):
        q, k = slow_queries_and_keys(visual, frames, layer, FAMILIES[family][2])
        with_class = [F.pad(v, (0, 0, 0, 0, 1, 0)) for v in (q, k)]  # the place of the class token, unused
        expected = adjacent_frame_maps(*with_class)
        torch.testing.assert_close(found.maps[layer], expected, atol=MAX_ERROR, rtol=0)
        assert expected.std() > 1e-3  # flat maps would agree with anything


@pytest.mark.parametrize("family", ["EVA-02", "PE-Core", "DINOv3"])
def test_rotary_positions_are_in_the_maps(family):
    visual, frames = small(family), clip_frames()
    before = Backbone(visual, layers=(2,))(frames).maps[2]
    real = visual.rope.get_embed
    visual.rope.get_embed = lambda *args, **kwargs: real(*args, **kwargs).roll(3, dims=0)
    assert (Backbone(visual, layers=(2,))(frames).maps[2] - before).abs().max() > 1e-3


def test_nothing_runs_after_the_last_block_needed_and_attention_pools_are_left_alone():
    visual = small("SigLIP 2")
    calls = []
    for number, block in enumerate(visual.blocks, start=1):
        block.register_forward_hook(lambda module, args, out, number=number: calls.append(number))
    visual.attn_pool.register_forward_hook(lambda module, args, out: calls.append("pool"))
    visual.norm.register_forward_hook(lambda module, args, out: calls.append("norm"))
    Backbone(visual, layers=(3, 1))(clip_frames())
    assert calls == [1, 2, 3]


def test_a_tower_inside_open_clips_wrapper_is_the_same_tower():
    wrapped = open_clip.timm_model.TimmModel("vit_tiny_patch16_224", 12, image_size=224, pool="token")
    visual = small("EVA-02-CLIP")
    wrapped.trunk = visual
    frames = clip_frames()
    inside, alone = (Backbone(tower, layers=(2, 3))(frames) for tower in (wrapped, visual))
    for layer in (2, 3):
        assert torch.equal(inside.tokens[layer], alone.tokens[layer])
        assert torch.equal(inside.maps[layer], alone.maps[layer])


def test_half_precision_gives_nearly_the_same():
    exact = Backbone(small("DINOv3"), layers=(4,))(clip_frames())
    half = Backbone(small("DINOv3").to(torch.bfloat16), layers=(4,))(clip_frames())
    assert half.tokens[4].dtype == half.maps[4].dtype == torch.bfloat16
    assert (half.tokens[4].float() - exact.tokens[4]).norm() < 0.03 * exact.tokens[4].norm()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("swin_tiny_patch4_window7_224", {}, r"timm's SwinTransformer.*windows.*have no meaning"),
        ("samvit_base_patch16", {"img_size": 64, "depth": 2}, r"timm's VisionTransformerSAM"),
        ("convnext_atto", {}, r"timm's ConvNeXt"),
        ("vit_relpos_base_patch16_224", {"depth": 1}, r"timm's VisionTransformerRelPos"),
    ],
)
def test_towers_whose_maps_have_no_meaning_are_refused_by_name(name, changes, message):
    with pytest.raises(UsageError, match=message):
        Backbone(timm.create_model(name, num_classes=0, **changes), layers=(1,))


def test_blocks_that_attend_in_another_way_are_refused():
    visual = timm.create_model("vit_small_patch16_224", attn_layer="diff", **SMALL | {"num_heads": 2})
    with pytest.raises(UsageError, match=r"attend by DiffAttention; expected Attention"):
        Backbone(visual, layers=(1,))


@pytest.mark.parametrize("family", ["SigLIP 2", "DINOv2 with registers"])
def test_maps_can_be_recomputed_from_tokens_where_a_norm_and_a_matrix_make_them(family):
    visual, frames = small(family), clip_frames()
    found = Backbone(visual, layers=(2, 3))(frames)
    projection = map_projections(visual, (3,), compute_dtype=torch.float32)[3]
    made = maps_from_tokens(found.tokens[2], projection)
    torch.testing.assert_close(made, found.maps[3], atol=1e-3, rtol=0)  # the matrix is kept in float16


@pytest.mark.parametrize(
    ("family", "reason"), [("DINOv3", "rotary"), ("norms of queries and keys", "norms them")]
)
def test_maps_that_tokens_do_not_tell_are_not_recomputed(family, reason):
    with pytest.raises(UsageError, match=rf"'recompute'.*{reason}.*use --maps uint8"):
        map_projections(small(family), (2,), compute_dtype=torch.float32)


@pytest.fixture
def tiny_timm(monkeypatch):
    """timm's names, but small."""
    real = timm.create_model
    small_sizes = {
        name: SMALL[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    }

    def create(name, **options):
        return real(name, **small_sizes | options)

    monkeypatch.setattr(timm, "create_model", create)


def test_timm_names_give_a_seeded_tower_and_its_description(tiny_timm):
    torch.manual_seed(5)
    drawn = torch.rand(2)
    torch.manual_seed(5)
    first, spec = build_tower("timm/vit_base_patch16_siglip_224", "none")
    assert torch.equal(torch.rand(2), drawn)
    second, again = build_tower("timm/vit_base_patch16_siglip_224", "none")
    assert spec == again and all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert (spec.model, spec.pretrained) == ("timm/vit_base_patch16_siglip_224", "none")
    assert (spec.image_size, spec.patch_size, spec.width, spec.blocks, spec.heads) == (32, 8, 48, 4, 3)
    assert (spec.class_token, spec.registers, spec.mean) == ("mean", 0, (0.5, 0.5, 0.5))
    dino = build_tower("timm/vit_base_patch16_dinov3", "none")[1]
    assert (dino.class_token, dino.registers) == ("own", 4)
    assert dino.mean == pytest.approx((0.485, 0.456, 0.406))


def test_another_image_size_is_written_behind_the_name(tiny_timm):
    assert build_tower("timm/vit_base_patch14_dinov2@64", "none")[1].grid == (8, 8)
    for wrong in ("timm/vit_base_patch14_dinov2@", "timm/vit_base_patch14_dinov2@big"):
        with pytest.raises(UsageError, match="expected pixels, such as @224"):
            build_tower(wrong, "none")


def test_an_unknown_timm_name_lists_near_ones():
    with pytest.raises(
        UsageError, match=r"timm has no vit_base_patch16_siglp_224, .*vit_base_patch16_siglip_224"
    ):
        build_tower("timm/vit_base_patch16_siglp_224", "none")


def test_weights_of_a_file_in_timms_names(tiny_timm, tmp_path):
    visual, _ = build_tower("timm/vit_base_patch16_dinov3", "none")
    state = {name: torch.randn_like(value) for name, value in visual.state_dict().items()}
    save_file(state | {"head.weight": torch.zeros(2, 48)}, tmp_path / "dino.safetensors")
    loaded, spec = build_tower("timm/vit_base_patch16_dinov3", str(tmp_path / "dino.safetensors"))
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())
    assert spec.pretrained == "dino.safetensors"
    with pytest.raises(WeightsError, match=r"do not match model timm/vit_base_patch16_siglip_224"):
        build_tower("timm/vit_base_patch16_siglip_224", str(tmp_path / "dino.safetensors"))


def test_without_a_network_timm_weights_are_one_line_with_ways_out(tiny_timm, monkeypatch):
    def no_network(*args, **options):
        raise OSError("cannot reach the hub\nat all")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
    monkeypatch.setattr("timm.models._builder.load_custom_from_hf", no_network)
    with pytest.raises(WeightsUnavailable, match=r"cannot reach the hub\); .*--pretrained FILE") as raised:
        build_tower("timm/vit_base_patch14_dinov2", default_pretrained("timm/vit_base_patch14_dinov2"))
    assert "'lvd142m' of timm/vit_base_patch14_dinov2" in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(
        WeightsError, match=r"nor a tag of timm/vit_base_patch14_dinov2; expected one of lvd142m"
    ):
        build_tower("timm/vit_base_patch14_dinov2", "openai")


def test_open_clip_names_whose_tower_is_timms(tiny_timm, tmp_path):
    """`ViT-B-16-SigLIP2` and its like; here through the same configuration in a file, made small."""
    config = open_clip.get_model_config("ViT-B-16-SigLIP2")
    config["vision_cfg"]["image_size"] = 64
    (tmp_path / "siglip2.json").write_text(json.dumps(config))
    visual, spec = build_tower(str(tmp_path / "siglip2.json"), "none")
    assert (spec.image_size, spec.grid, spec.class_token) == (64, (8, 8), "mean")
    assert adapter_of(visual).num_layers == 4
    save_file({f"visual.{n}": v for n, v in visual.state_dict().items()}, tmp_path / "whole.safetensors")
    _, loaded = build_tower(str(tmp_path / "siglip2.json"), str(tmp_path / "whole.safetensors"))
    assert loaded.weights_sha256 == spec.weights_sha256
