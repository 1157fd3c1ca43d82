"""`--maps recompute`: no maps are stored, and yet every reader gets them.

B samples, L layers, T frames, P patches.
"""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from evl_cache.attention_maps import adjacent_frame_maps, maps_from_tokens
from evl_cache.batches.batch_memory import BatchMemory
from evl_cache.batches.feature_loader import FeatureLoader
from evl_cache.errors import CacheDamaged, CacheError, UsageError
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.repair import repair
from evl_cache.heads import build_head
from evl_cache.runs.scoring import head_logits
from evl_cache.spec import CacheSpec
from evl_cache.store import PROJECTIONS_NAME, FeatureCache, Reads, verify_cache
from evl_cache.store.format.size import num_files, sample_nbytes
from evl_cache.towers.backbone import Backbone, map_projections
from evl_cache_cli.main import cli
from tests.support.fake_streams import FakeStreams
from tests.support.store_helpers import extract_small, load_clips, small_spec, small_tower, tree


@pytest.fixture(scope="module")
def caches(motions: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same clips with fp16 maps and with recomputed ones, int8 tokens both; layers 2 and 3."""
    folder = tmp_path_factory.mktemp("recompute")
    clips, tower = load_clips(motions), small_tower(motions)
    for maps in ("fp16", "recompute"):
        extract_small(clips, folder / maps, spec=small_spec(clips, tower, maps=maps))
    return {maps: folder / maps for maps in ("fp16", "recompute")}


@pytest.fixture
def copied(caches: dict[str, Path], tmp_path: Path) -> Path:
    """A cache that may be damaged."""
    for name, content in tree(caches["recompute"]).items():
        (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / name).write_bytes(content)
    return tmp_path / "cache"


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_maps_from_exact_tokens_are_the_backbones(motions: Path) -> None:
    visual = small_tower(motions).visual
    frames = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = Backbone(visual, (1, 2, 3))(frames)
    projections = map_projections(visual, (2, 3), compute_dtype=torch.float32)
    for layer, projection in projections.items():
        exact = replace(projection, weight=visual.transformer.resblocks[layer - 1].attn.in_proj_weight[:128])  # type: ignore[union-attr,index]
        found = maps_from_tokens(features.tokens[layer - 1], exact)
        torch.testing.assert_close(found, features.maps[layer], atol=1e-6, rtol=1e-5)
        # What is kept is rounded to float16: far below what int8 tokens cost.
        assert relative(maps_from_tokens(features.tokens[layer - 1], projection), features.maps[layer]) < 1e-3


def test_autocast_does_not_reach_the_maps(motions: Path) -> None:
    projection = map_projections(small_tower(motions).visual, (2,), compute_dtype=torch.float32)[2]
    tokens = torch.randn(1, 3, 5, 64, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = maps_from_tokens(tokens, projection)
    assert found.dtype == torch.float32
    assert torch.equal(found, maps_from_tokens(tokens, projection))


def test_a_tower_moved_to_half_precision_keeps_the_same_projections(motions: Path) -> None:
    from copy import deepcopy

    visual = deepcopy(small_tower(motions).visual)
    before = map_projections(visual, (2,), compute_dtype=torch.float16)[2]
    after = map_projections(visual.half(), (2,), compute_dtype=torch.float16)[2]
    for name in ("norm_weight", "norm_bias", "weight", "bias"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert before.norm_weight.dtype == torch.float32


def test_read_gives_the_maps_that_would_have_been_stored(caches: dict[str, Path]) -> None:
    stored, made = FeatureCache(caches["fp16"]), FeatureCache(caches["recompute"])
    assert made.spec.has_maps and made.spec.layers == (2, 3) and made.spec.stored_layers == (1, 2, 3)
    samples = np.flatnonzero(made.is_valid).tolist()
    assert len(samples) == len(made) - 1
    (tokens, maps), (expected_tokens, expected_maps) = made.read(samples), stored.read(samples)
    assert maps is not None and expected_maps is not None
    for found, expected in zip(tokens, expected_tokens, strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(maps, expected_maps, strict=True):
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert relative(found, expected) < 0.008  # docs/rate-distortion.md


def test_read_agrees_with_the_slow_twin(caches: dict[str, Path], motions: Path) -> None:
    """ln_1 and the in-projection of the tower itself, on the dequantised tokens one layer below."""
    below, _ = _read_layer_one(caches["recompute"])
    attn_block = small_tower(motions).visual.transformer.resblocks[1]  # type: ignore[union-attr,index]
    with torch.no_grad():
        qkv = attn_block.ln_1(below) @ attn_block.attn.in_proj_weight.T + attn_block.attn.in_proj_bias
    q, k = (part.unflatten(-1, (2, 32)) for part in qkv.chunk(3, dim=-1)[:2])
    _, maps = FeatureCache(caches["recompute"]).read([0, 3], layers=(2,))
    assert maps is not None
    assert relative(maps[0], adjacent_frame_maps(q, k)) < 1e-3


def _read_layer_one(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of block 1, which no caller may ask for, through the stored arrays."""
    from evl_cache.quantize import dequantize_tokens

    cache = FeatureCache(path)
    rows = [cache.read_row(sample) for sample in (0, 3)]
    names = ("tokens", "token_affine", "token_scale")
    codes, affine, scale = (torch.from_numpy(np.stack([row[name][0] for row in rows])) for name in names)
    return dequantize_tokens(codes, affine, scale), codes


def test_layers_are_read_alone_and_together(caches: dict[str, Path]) -> None:
    cache = FeatureCache(caches["recompute"])
    together, maps_together = cache.read([0, 1], layers=(2, 3))
    assert maps_together is not None
    for i, layer in enumerate((2, 3)):
        tokens, maps = cache.read([1, 0], layers=(layer,))
        assert maps is not None
        assert torch.equal(tokens[0].flip(0), together[i])
        assert torch.equal(maps[0].flip(0), maps_together[i])
    with pytest.raises(UsageError, match=r"layers \[1\] are not stored"):
        cache.read([0], layers=(1,))


def test_a_head_trains_on_made_maps_from_the_loader(caches: dict[str, Path]) -> None:
    cache = FeatureCache(caches["recompute"])
    loader = FeatureLoader(cache, np.arange(len(cache)), layers=(2, 3), batch=3)
    torch.manual_seed(0)
    head = build_head("decoder2", width=64, num_frames=4, grid=(2, 2), num_classes=8).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for batch in loader.epoch():
        assert batch.features.maps is not None
        tokens, maps = cache.read(batch.samples.tolist(), layers=(2, 3))
        logits = head_logits(head, batch.features.to("cpu"))
        torch.testing.assert_close(logits, head(tokens, maps), atol=1e-4, rtol=1e-4)
        logits.sum().backward()  # type: ignore[no-untyped-call]
    assert any(
        bool(p.grad.abs().sum() > 0)
        for n, p in head.named_parameters()
        if p.grad is not None and "motion" in n
    )


def test_maps_are_made_on_the_device_from_the_tokens_that_were_copied_there(caches: dict[str, Path]) -> None:
    cache = FeatureCache(caches["recompute"])
    memory = BatchMemory("cpu:0", streams=FakeStreams(lazy="copies", host_computes=True))
    loader = FeatureLoader(cache, np.arange(len(cache)), layers=(2, 3), batch=3, memory=memory)
    for batch in loader.epoch():
        for found, expected in zip(
            batch.features.dequantized(), cache.read(batch.samples.tolist(), layers=(2, 3)), strict=True
        ):
            assert found is not None and expected is not None
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)


def test_tokens_below_are_moved_once_and_parts_keep_their_maps(caches: dict[str, Path]) -> None:
    batch = FeatureCache(caches["recompute"]).read_stored([0, 1, 2])
    assert batch.maps is not None
    part = batch.part(1, 3).to("cpu")
    assert part.maps is not None
    assert part.maps[1].below is part.tokens[0]  # type: ignore[union-attr]
    made = part.with_made_maps().maps
    _, expected = batch.dequantized()
    assert made is not None and expected is not None
    for found, whole in zip(made, expected, strict=True):
        assert torch.equal(found, whole[1:3])  # type: ignore[arg-type]


def test_without_maps_the_layers_below_are_not_read(caches: dict[str, Path]) -> None:
    cache = FeatureCache(caches["recompute"])
    without, with_maps = (
        cache.buffers(slots=1, reads=Reads(layers=(3,), with_maps=w)) for w in (False, True)
    )
    assert len(without.arrays["tokens"]) == 1 and len(with_maps.arrays["tokens"]) == 2
    assert cache.read_stored([0], Reads(layers=(3,), with_maps=False)).maps is None


def test_a_pickled_cache_makes_maps_too(caches: dict[str, Path]) -> None:
    cache = FeatureCache(caches["recompute"])
    _, maps = cache.read([0])
    _, again = pickle.loads(pickle.dumps(cache)).read([0])
    assert maps is not None and all(torch.equal(a, b) for a, b in zip(maps, again, strict=True))


def test_the_store_holds_projections_instead_of_maps(caches: dict[str, Path]) -> None:
    path, cache = caches["recompute"], FeatureCache(caches["recompute"])
    assert not (path / "maps").exists() and not (path / "map_scale").exists()
    tensors = load_file(path / PROJECTIONS_NAME)
    assert tensors["2.weight"].shape == (128, 64) and tensors["2.weight"].dtype == torch.float16
    assert sorted({name.split(".")[0] for name in tensors}) == ["2", "3"]
    assert len(tree(path)) - len(list((path / "locks").iterdir())) == num_files(cache.spec)
    assert sample_nbytes(cache.spec)[0] == sum(
        value.nbytes for value in cache.read_row(0).values()
    )  # three layers
    assert cache.spec.feature_id != FeatureCache(caches["fp16"]).spec.feature_id


def test_extraction_killed_and_repeated_gives_the_same_bytes(
    caches: dict[str, Path], motions: Path, tmp_path: Path
) -> None:
    clips = load_clips(motions)
    extract_small(clips, tmp_path / "again", spec=small_spec(clips, small_tower(motions), maps="recompute"))
    again, first = tree(tmp_path / "again"), tree(caches["recompute"])
    assert {n: c for n, c in again.items() if "locks" not in n} == {
        n: c for n, c in first.items() if "locks" not in n
    }


def test_block_one_and_contradictions_are_refused(caches: dict[str, Path]) -> None:
    spec = FeatureCache(caches["recompute"]).spec
    with pytest.raises(UsageError, match="layer 1 has no layer below"):
        replace(spec, layers=(1, 2))
    assert CacheSpec.from_json(spec.to_json()) == spec
    one_frame = replace(spec, layers=(1, 2), views=replace(spec.views, frames=1))
    assert one_frame.stored_layers == (1, 2) and not one_frame.recomputes_maps


def test_rows_are_reused_by_a_growing_list(caches: dict[str, Path], motions: Path, tmp_path: Path) -> None:
    clips, tower = load_clips(motions), small_tower(motions)
    fewer = replace(clips, clips=clips.clips[:4])
    result = extract_small(
        fewer,
        tmp_path / "grown",
        spec=small_spec(fewer, tower, maps="recompute", layers=(3,)),
        reuse=caches["recompute"],
    )
    assert not result.failures
    (tokens, maps), (expected_tokens, expected_maps) = (
        FeatureCache(path).read([0, 1, 2, 3], layers=(3,))
        for path in (tmp_path / "grown", caches["recompute"])
    )
    assert maps is not None and expected_maps is not None
    assert torch.equal(tokens[0], expected_tokens[0]) and torch.equal(maps[0], expected_maps[0])


@pytest.mark.parametrize("damage", ["flip", "remove", "truncate"])
def test_damaged_projections_are_found_and_repaired(copied: Path, motions: Path, damage: str) -> None:
    path = copied / PROJECTIONS_NAME
    before = tree(copied)
    if damage == "remove":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content) if damage == "flip" else path.read_bytes()[:-1])
    cache = FeatureCache(copied)
    with pytest.raises(CacheDamaged, match=PROJECTIONS_NAME):
        cache.read([0])
    assert cache.read_stored(
        [0], Reads(layers=cache.spec.layers, with_maps=False)
    ).tokens  # tokens are still there
    problems = verify_cache(copied).problems
    assert len(problems) == 1 and problems[0].block is None and PROJECTIONS_NAME in problems[0].reason
    result = repair(
        copied,
        tower=lambda _: small_tower(motions),
        root=motions,
        options=ExtractOptions(batch=4, decode_workers=1),
    )
    assert result.files_restored == (PROJECTIONS_NAME,) and result.blocks_redone == ()
    assert result.cache_digest_before == result.cache_digest_after
    assert verify_cache(copied).problems == ()
    assert {n: c for n, c in tree(copied).items() if "locks" not in n} == {
        n: c for n, c in before.items() if "locks" not in n
    }


def test_projections_are_not_repaired_from_another_tower(copied: Path, motions: Path) -> None:
    (copied / PROJECTIONS_NAME).unlink()
    tower = small_tower(motions)
    other = tower._replace(spec=replace(tower.spec, weights_sha256="0" * 64))
    with pytest.raises(UsageError, match="their features differ"):
        repair(copied, tower=lambda _: other, root=motions, options=ExtractOptions())
    weights = FeatureCache(copied).description
    assert weights.projections_sha256 is not None
    from copy import deepcopy

    changed = tower._replace(visual=deepcopy(tower.visual))
    with torch.no_grad():
        changed.visual.transformer.resblocks[1].ln_1.weight.mul_(2)  # type: ignore[operator,union-attr,index]
    with pytest.raises(CacheError, match="byte for byte"):
        repair(copied, tower=lambda _: changed, root=motions, options=ExtractOptions())


def test_from_the_command_line(motions: Path, tmp_path: Path) -> None:
    runner, cache = CliRunner(), tmp_path / "cache"
    lines = "".join(f"{motions / f'{i:02d}.mp4'} {i}\n" for i in (0, 1, 2, 3))
    (tmp_path / "clips.txt").write_text(lines)
    options = (
        f"--dataset list --list {tmp_path / 'clips.txt'} --model {motions / 'tower.json'} --pretrained none"
    )
    options += " --frames 4 --stride 2 --maps recompute --device cpu"
    estimated = runner.invoke(cli, f"estimate {options} --layers 2-3".split())
    assert estimated.exit_code == 0, estimated.output
    done = runner.invoke(cli, f"extract {options} --layers 2-3 --cache {cache}".split())
    assert done.exit_code == 0, done.output
    info = runner.invoke(cli, ["info", str(cache)])
    assert "maps recompute" in info.output and "(and tokens of 1, for maps)" in info.output
    trained = runner.invoke(
        cli,
        f"train --cache {cache} --val-cache {cache} --head decoder2 --epochs 1 --batch 4 --device cpu "
        f"--out {tmp_path / 'run'}".split(),
    )
    assert trained.exit_code == 0, trained.output
    scored = runner.invoke(cli, f"eval --cache {cache} --run {tmp_path / 'run'} --device cpu".split())
    assert scored.exit_code == 0, scored.output
    refused = runner.invoke(cli, f"extract {options} --layers 1-2 --cache {tmp_path / 'no'}".split())
    assert isinstance(refused.exception, UsageError) and "layer 1" in str(refused.exception)
