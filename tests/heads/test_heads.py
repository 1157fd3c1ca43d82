"""The heads beyond EVL: each against its twin, through training, evaluation and loading, and the how-to of a new one."""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evl_cache import load_head
from evl_cache.errors import UsageError
from evl_cache.heads import HEADS, EVLHead, build_head, head_class, head_layers
from evl_cache.heads.layer_tokens import LayerTokens
from evl_cache.quantize import quantize_tokens
from evl_cache.runs.evaluate import evaluate
from evl_cache.store import Reads, StoredBatch
from evl_cache.store.reading.sample_reader import SampleReader
from evl_cache.train.stage import TrainOptions, train
from tests.support.feature_caches import write_pair
from tests.support.plain_heads import TWINS

DOC = Path(__file__).resolve().parents[2] / "docs" / "heads.md"
OTHERS = [name for name in HEADS if name != "decoderN"]
OPTIONS = TrainOptions(head="linear", epochs=2, batch=4, lr=3e-3, seed=5)
SIZES = {"width": 16, "num_frames": 3, "grid": (2, 3), "num_classes": 4, "num_heads": 2, "dropout": 0.0}
# Frames, grid: also one frame, and one patch.
SHAPES = [(3, (2, 3)), (1, (2, 2)), (2, (1, 1))]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("caches"))


def new_head(name, *, frames=3, grid=(2, 3), dtype=torch.float64, **changes):
    """A head none of whose parameters is zero, as some are in the beginning."""
    depth = head_class(name).default_depth or 2
    config = {**SIZES, "num_frames": frames, "grid": grid, "num_layers": depth, **changes}
    head = build_head(name, **config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.3)
    return head


def random_tokens(head, *, clips=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (clips, head.num_frames, 1 + head.grid[0] * head.grid[1], head.width)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(head.num_layers)]


def gradients(head, logits):
    head.zero_grad()
    weights = torch.arange(logits.numel(), dtype=torch.float64).cos().view_as(logits)
    (logits * weights).sum().backward()
    return {name: p.grad for name, p in head.named_parameters()}


@pytest.mark.parametrize("modules_on", [True, False])
@pytest.mark.parametrize(("frames", "grid"), SHAPES)
@pytest.mark.parametrize("name", OTHERS)
def test_logits_and_gradients_equal_the_plain_twins(name, frames, grid, modules_on):
    switches = dict.fromkeys(head_class(name).temporal_modules, modules_on)
    head = new_head(name, frames=frames, grid=grid, **switches)
    tokens = random_tokens(head)
    expected = TWINS[type(head)](head, tokens)
    expected_gradients = gradients(head, expected)
    logits = head(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    for parameter, gradient in gradients(head, logits).items():
        assert gradient is not None, parameter
        torch.testing.assert_close(gradient, expected_gradients[parameter], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [*OTHERS, "decoder2"])
def test_codes_give_what_their_decoded_values_give_and_are_not_changed(name):
    head = new_head(name, dtype=torch.float32, num_layers=head_class(name).default_depth or 2)
    coded = [quantize_tokens(t) for t in random_tokens(head, dtype=torch.float32)]
    maps = None
    if head.reads_maps:
        maps = [torch.rand(2, 2, 2, 6, 6) for _ in coded]
    shared = [LayerTokens(q) for q in coded]
    before = [q.codes.clone() for q in coded]
    expected = head([s.values for s in shared], maps)
    torch.testing.assert_close(head(coded, maps), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(head(shared, maps), expected)
    assert all(torch.equal(q.codes, b) for q, b in zip(coded, before, strict=True))


def test_what_layer_tokens_share_is_what_the_values_say():
    stored = quantize_tokens(torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(0)) * 5)
    layer, other = LayerTokens(stored), LayerTokens(stored)
    alone = other.class_tokens  # before anything else is decoded
    assert torch.equal(alone, layer.values[:, :, 0]) and torch.equal(layer.class_tokens, alone)
    assert not other.has_values
    torch.testing.assert_close(layer.mean, layer.values.flatten(1, 2).mean(1))
    normed = torch.nn.LayerNorm(16, elementwise_affine=False)(layer.values)
    torch.testing.assert_close(layer.unit, normed)
    assert layer.values is layer.values and layer.unit is layer.unit


@pytest.mark.parametrize("name", OTHERS)
def test_every_head_trains_evaluates_and_loads(caches, tmp_path, name):
    losses = []
    result = train(
        *caches,
        options=replace(OPTIONS, head=name, epochs=8, batch=13, lr=1e-2, dropout=0.0),
        out=tmp_path / "run",
        on_step=lambda *s: losses.append(s[2]),
    )
    assert len(losses) == 8 and losses[-1] < 0.9 * losses[0]
    scored = evaluate(tmp_path / "run", caches[1])
    assert (scored.top1, scored.val_clips) == (result.top1, 5)
    head = load_head(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert type(head) is HEADS[name] and config["head"] == name
    layers = tuple(config["layers"])
    assert layers == head_layers(name, (2, 3, 4))
    again = load_head(tmp_path / "run")
    tokens, _ = caches[1].read(range(5), layers=layers)
    assert torch.equal(head(tokens), again(tokens))


@pytest.mark.parametrize("how", [{}, {"keep_in": "ram"}, {"batch": "auto"}])
def test_a_linear_head_reads_class_tokens_and_nothing_else(caches, tmp_path, monkeypatch, how):
    read = []
    real = SampleReader.read_sample

    def counted(self, stacks, slot, sample, positions):
        read.extend((name, len(stack)) for name, stack, _ in stacks)
        real(self, stacks, slot, sample, positions)

    monkeypatch.setattr(SampleReader, "read_sample", counted)
    train(*caches, options=replace(OPTIONS, **how), out=tmp_path / "run")
    evaluate(tmp_path / "run", caches[1])
    assert {name for name, _ in read} == {"class_tokens"}
    assert {chunks for _, chunks in read} == {1}  # of one layer


def test_class_tokens_alone_give_a_linear_head_what_whole_tokens_give(caches):
    cache, _ = caches
    head = build_head("linear", **{**SIZES, "grid": (2, 2), "num_layers": 2}).eval()
    alone: StoredBatch = cache.read_stored([0, 7], Reads(layers=(3, 4), with_maps=False, tokens="class"))
    assert alone.tokens == [] and alone.class_tokens is not None
    both = cache.read_stored([0, 7], Reads(layers=(3, 4), tokens="both"))
    whole, _ = cache.read([0, 7], (3, 4))
    for a, b, t in zip(alone.class_tokens, both.class_tokens, whole, strict=True):
        assert torch.equal(a, b) and a.shape == (2, 3, 1, 16)
        torch.testing.assert_close(a[:, :, 0].float(), t[:, :, 0], atol=0.05, rtol=0)
    logits = head(alone.class_tokens)
    torch.testing.assert_close(logits, head(whole), atol=0.05, rtol=0)


# Names, layers and refusals


def test_names_tell_the_layers():
    cached = (8, 9, 10, 11, 12)
    assert head_layers("decoder4", cached) == (9, 10, 11, 12)
    assert head_layers("linear", cached) == (12,) and head_layers("linear", cached, (8, 12)) == (8, 12)
    assert head_layers("mlap", cached) == cached and head_layers("uniformerv2", cached) == cached[1:]
    assert head_layers("uniformerv2", (1, 2)) == (1, 2)
    assert head_class("decoder12") is EVLHead


@pytest.mark.parametrize("name", ["", "decoder", "decoderN", "decoder0", "linear2", "Linear", "uniformerv"])
def test_unknown_names_are_refused_with_the_list(name):
    with pytest.raises(UsageError, match=r"unknown head .*decoderN, linear, meanpool, attentive, mlap"):
        head_class(name)


def test_contradictions_are_refused(caches, tmp_path):
    with pytest.raises(UsageError, match="attentive reads 1 layers, --head-layers names 2"):
        head_layers("attentive", (1, 2, 3), (2, 3))
    with pytest.raises(UsageError, match="linear has no temporal_conv to switch off; it has no such module"):
        train(*caches, options=replace(OPTIONS, temporal_conv=False), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="3 heads do not divide the head's width of 16"):
        build_head("mlap", **{**SIZES, "num_layers": 1, "num_heads": 3})
    head = new_head("meanpool")
    tokens = random_tokens(head)
    for bad, message in (
        ([*tokens, *tokens], "tokens of 2 layers; this head has 1"),
        ([tokens[0][:, :, :1]], "this head expects"),
        ([tokens[0][..., :8]], "this head expects"),
        ([tokens[0].to(torch.int8)], "floating-point"),
    ):
        with pytest.raises(UsageError, match=message):
            head(bad)


def test_zero_initialised_branches_begin_as_nothing():
    head = build_head("uniformerv2", **{**SIZES, "num_layers": 2}).eval()
    tokens = random_tokens(head, dtype=torch.float32)
    half = torch.nn.functional.layer_norm(tokens[-1][:, :, 0].mean(1) / 2, (16,))
    torch.testing.assert_close(head(tokens), head.classifier(half))


# The how-to


def test_a_head_added_as_the_documentation_says_trains_and_loads(caches, tmp_path, monkeypatch):
    text = DOC.read_text(encoding="utf-8")
    source = re.search(r"evl_cache/heads/(\w+)\.py`.*?```python\n(.*?)```", text, re.DOTALL)
    assert source is not None, "docs/heads.md shows a whole file"
    name, code = source[1], source[2]
    line = re.search(r'^\s+"(\w+)": (\w+),\s*$', text, re.MULTILINE)
    assert line is not None, "docs/heads.md shows the line of the registry"
    assert line[1] not in HEADS
    path = tmp_path / f"{name}.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"evl_cache.heads.{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(HEADS, line[1], getattr(module, line[2]))
    losses = []
    result = train(
        *caches,
        options=replace(OPTIONS, head=line[1], epochs=8, batch=13, lr=1e-2, dropout=0.0),
        out=tmp_path / "run",
        on_step=lambda *s: losses.append(s[2]),
    )
    assert losses[-1] < 0.9 * losses[0]
    assert evaluate(tmp_path / "run", caches[1]).top1 == result.top1
    assert type(load_head(tmp_path / "run")).__name__ == line[2]


def test_the_documentation_names_every_head_and_its_paper():
    text = DOC.read_text(encoding="utf-8")
    for name, kind in HEADS.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        papers = set(re.findall(r"\d{4}\.\d{5}", row))
        assert papers, row
        assert papers & set(re.findall(r"\d{4}\.\d{5}", sys.modules[kind.__module__].__doc__ or "")), name
