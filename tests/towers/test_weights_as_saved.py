"""Weights as training scripts save them: behind prefixes, in dictionaries, beside other objects; evl-tiny's own."""

import argparse
import logging
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from evl_cache.errors import WeightsError
from evl_cache.towers import build_tower

State = dict[str, torch.Tensor]
MLP = "transformer.resblocks.5.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def tiny() -> State:
    return dict(build_tower("evl-tiny", "rendered-v1").visual.state_dict())


def behind(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def compiled_blocks(state: State) -> State:
    return {name.replace("resblocks.1.", "resblocks.1._orig_mod."): value for name, value in state.items()}


def of_transformers(state: State) -> State:
    """The state dict of transformers' CLIPVisionModelWithProjection."""
    out = {"vision_model.embeddings.position_ids": torch.arange(37)[None]}
    names = {
        "ln_pre.": "pre_layrnorm.",
        "ln_post.": "post_layernorm.",
        "conv1.": "embeddings.patch_embedding.",
    }
    names |= {".ln_": ".layer_norm", ".attn.": ".self_attn.", ".c_fc.": ".fc1.", ".c_proj.": ".fc2."}
    names |= {"transformer.resblocks.": "encoder.layers.", "class_emb": "embeddings.class_emb"}
    names |= {"positional_embedding": "embeddings.position_embedding.weight"}
    for name, value in state.items():
        for own, theirs in names.items():
            name = name.replace(own, theirs)
        if name == "proj":
            out["visual_projection.weight"] = value.T.contiguous()
        elif ".in_proj_" in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                out[f"vision_model.{name.replace('.in_proj_', f'.{part}_proj.')}"] = third.clone()
        else:
            out[f"vision_model.{name}"] = value
    return out


OF_TRAINING = (
    "optim",
    "optimizer_state_dict",
    "optimizer_0",
    "exp_avg",
    "max_exp_avg_sq",
    "momentum",
    "grads",
)
# What is saved, and what is said of it: a part of the line, or nothing.
SAVED: dict[str, tuple[Callable[[State], Any], str]] = {
    "image_encoder": (
        lambda s: {"model": behind("module.image_encoder.", s)},
        "'module.image_encoder.' in ['model']",
    ),
    "model.visual": (
        lambda s: {"state_dict": behind("model.visual.", s)},
        "'model.visual.' in ['state_dict']",
    ),
    "backbone": (lambda s: {"model_state": behind("backbone.", s)}, "'backbone.' in ['model_state']"),
    "encoder.visual": (
        lambda s: {"network": behind("encoder.visual.", s)},
        "'encoder.visual.' in ['network']",
    ),
    "_orig_mod": (lambda s: behind("_orig_mod.", s), "'_orig_mod.'"),
    "_orig_mod.visual": (lambda s: behind("_orig_mod.visual.", s), "'_orig_mod.visual.'"),
    "module._orig_mod": (lambda s: behind("module._orig_mod.visual.", s), "'module._orig_mod.visual.'"),
    "compiled layers": (lambda s: behind("net.", compiled_blocks(s)), "'net.'"),
    "compiled layers alone": (compiled_blocks, ""),
    "containers": (
        lambda s: {"net": {"teacher": OrderedDict(behind("a.b.", s))}},
        "'a.b.' in ['net']['teacher']",
    ),
    "only EMA": (lambda s: {"model_ema": s, "epoch": 3}, "['model_ema']"),
    "equal EMA": (lambda s: {"model": s, "model_ema": {n: v.clone() for n, v in s.items()}}, ""),
    "text beside it": (
        lambda s: {**behind("visual.", s), "transformer.resblocks.0.ln_1.weight": torch.ones(4)},
        "",
    ),
    "a teacher of another size": (
        lambda s: {**behind("student.", s), **behind("teacher.", {n: v[..., :1] for n, v in s.items()})},
        "'student.'",
    ),
    "an optimizer beside it": (
        lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}},
        "",
    ),
    "momenta by name": (
        lambda s: {"model": s, "optimizer": {"exp_avg": s, "exp_avg_sq": {n: v + 1 for n, v in s.items()}}},
        "",
    ),
    "momenta by name alone": (
        lambda s: {"model": s, **{k: {n: v + 1 for n, v in s.items()} for k in OF_TRAINING}},
        "",
    ),
    "momenta behind a prefix": (
        lambda s: {**behind("m.", s), **behind("optimizer.exp_avg.", {n: v * 0 for n, v in s.items()})},
        "'m.'",
    ),
    "transformers": (of_transformers, ""),
    "transformers, wrapped": (
        lambda s: {"net": behind("clip.", of_transformers(s))},
        "'clip.visual.' in ['net']",
    ),
    "in a list": (lambda s: {"model": [s]}, "['model'][0]"),
    "argparse": (lambda s: {"model": s, "args": argparse.Namespace(lr=1, out=PurePosixPath("runs"))}, ""),
    "numpy": (lambda s: {"state_dict": s, "best": np.float64(0.5), "curve": np.arange(3.0)}, ""),
    "head": (lambda s: {**s, "head.weight": torch.zeros(3, 3)}, "left out head.weight"),
    "averaged": (lambda s: {**behind("module.", s), "n_averaged": torch.tensor(3)}, "left out n_averaged"),
}


@pytest.mark.parametrize("kind", SAVED)
def test_weights_behind_a_prefix_or_beside_other_things_have_the_digest_of_the_tower_alone(
    tiny: State, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    save, told = SAVED[kind]
    torch.save(save(tiny), tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING, logger="evl_cache"):
        tower = build_tower("evl-tiny", str(tmp_path / "w.pt"))
    assert tower.spec.weights_sha256 == build_tower("evl-tiny", "rendered-v1").spec.weights_sha256
    assert told in caplog.text if told else not caplog.text


def refused(state: Any, path: Path) -> str:
    torch.save(state, path)
    with pytest.raises(WeightsError) as raised:
        build_tower("evl-tiny", str(path))
    assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)
    return str(raised.value)


AUX = {"aux.w": torch.ones(2)}
# A tower and another with the same names, and what the error says of them: no names beside either hide the other.
TWO: dict[str, tuple[Callable[[State, State], Any], str]] = {
    "EMA": (lambda s, o: {"model": s, "model_ema": o}, "['model'] and ['model_ema']"),
    "teacher": (
        lambda s, o: {**behind("teacher.visual.", s), **behind("student.visual.", o)},
        "'teacher.visual.' and 'student.visual.'",
    ),
    "EMA beside plain names": (lambda s, o: {**s, **behind("ema.", o)}, "'ema.' and names without a prefix"),
    "more in the first": (lambda s, o: {"model": s | AUX, "model_ema": o}, "['model_ema'] and ['model']"),
    "more in the second": (lambda s, o: {"model": s, "model_ema": o | AUX}, "['model'] and ['model_ema']"),
    "more in both": (lambda s, o: {"model": s | AUX, "model_ema": o | AUX}, "['model'] and ['model_ema']"),
    "more behind one prefix": (
        lambda s, o: {**behind("online.", s | AUX), **behind("target.", o)},
        "'target.' and 'online.'",
    ),
    "beside a Namespace": (
        lambda s, o: {"model": s, "ema": o, "args": argparse.Namespace(lr=1)},
        "['model'] and ['ema']",
    ),
    "a momentum encoder": (
        lambda s, o: {"encoder": s, "momentum_encoder": o},
        "['encoder'] and ['momentum_encoder']",
    ),
    "numbered": (lambda s, o: {"models": {0: s, "0": o}}, "['models'][0] and ['models']['0']"),
}


def advice_in(said: str) -> str:
    return said.partition("alone, as ")[2].rpartition(" does for")[0]


@pytest.mark.parametrize("kind", TWO)
def test_two_towers_that_fit_and_differ_are_an_error_that_names_both_and_its_advice_works(
    tiny: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    other = {name: value + 1 for name, value in tiny.items()}
    save, told = TWO[kind]
    said = refused(save(tiny, other), tmp_path / "two.pt")
    assert f"2 towers that fit and differ: {told}; " in said
    exec(advice_in(said))  # what the line tells people to run
    is_first = "ema" not in told.partition(" and ")[0] and "target" not in told.partition(" and ")[0]
    saved = build_tower("evl-tiny", "one.pt").visual.state_dict()
    assert torch.equal(saved[MLP], (tiny if is_first else other)[MLP])


def test_the_advice_for_two_towers_works_for_safetensors(
    tiny: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = {name: value + 1 for name, value in tiny.items()}
    save_file(behind("b.", tiny) | behind("a.", other), "two.safetensors")
    with pytest.raises(WeightsError) as raised:
        build_tower("evl-tiny", "two.safetensors")
    exec(advice_in(str(raised.value)))
    saved = build_tower("evl-tiny", "one.pt").visual.state_dict()
    assert torch.equal(saved[MLP], other[MLP])


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        ("without values (device 'meta')", lambda v: v.to("meta")),
        ("sparse_coo, float32", lambda v: v.to_sparse()),
        ("strided, complex64", lambda v: v.to(torch.complex64)),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("towers", [1, 2])
def test_tensors_that_are_no_plain_numbers_are_refused(
    tiny: State, tmp_path: Path, kind: str, made: Callable[[torch.Tensor], torch.Tensor], towers: int
) -> None:
    said = refused(
        {str(i): {name: made(value) for name, value in tiny.items()} for i in range(towers)},
        tmp_path / "w.pt",
    )
    assert f"is a tensor {kind}; expected plain real numbers" in said


def test_equal_towers_are_read_from_the_one_without_other_names(tiny: State, tmp_path: Path) -> None:
    torch.save({"model": tiny | AUX, "model_ema": tiny}, tmp_path / "w.pt")
    tower = build_tower("evl-tiny", str(tmp_path / "w.pt"))
    assert torch.equal(tower.visual.state_dict()[MLP], tiny[MLP])


def test_many_towers_and_long_keys_are_a_short_line(tiny: State, tmp_path: Path) -> None:
    towers = {"k" * 5000 + str(i): {name: value + i for name, value in tiny.items()} for i in range(5)}
    said = refused(towers, tmp_path / "w.pt")
    assert "5 towers that fit and differ" in said and " and 2 more; save the one you mean alone" in said
    assert len(said) < 600


def save_deep(state: State, depth: int, path: Path) -> None:
    """Save a state dict within so many dictionaries, which Python's pickler could not write."""
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            if name.endswith("/data.pkl"):  # two bytes of protocol, an object, one byte that ends it
                content = content[:2] + b"}X\x01\x00\x00\x00a" * depth + content[2:-1] + b"s" * depth + b"."
            archive.writestr(name, content)


def test_dictionaries_within_each_other_are_read_to_a_depth(tiny: State, tmp_path: Path) -> None:
    save_deep(tiny, 60, tmp_path / "w.pt")
    assert torch.equal(build_tower("evl-tiny", str(tmp_path / "w.pt")).visual.state_dict()[MLP], tiny[MLP])
    save_deep(tiny, 3000, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="dictionaries are more than 64 deep; expected a state dict"):
        build_tower("evl-tiny", str(tmp_path / "w.pt"))


class RunsOnLoading(nn.Module):
    """Its TorchScript archive holds a method that torch.jit.load calls."""

    @torch.jit.export
    def __getstate__(self) -> int:
        return 1

    @torch.jit.export
    def __setstate__(self, state: int) -> None:
        raise RuntimeError("code of the file was run")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit.* deprecated")
@pytest.mark.parametrize("entry", ["code/__torch__", "CODE/__TORCH__"])
def test_a_torchscript_archive_that_runs_code_on_loading_is_refused_unrun(tmp_path: Path, entry: str) -> None:
    torch.jit.script(RunsOnLoading()).save(str(tmp_path / "own.pt"))
    with zipfile.ZipFile(tmp_path / "own.pt") as archive, zipfile.ZipFile(tmp_path / "w.pt", "w") as other:
        for each in archive.infolist():
            other.writestr(each.filename.replace("code/__torch__", entry), archive.read(each))
    with pytest.raises(torch.jit.Error, match="was run"):
        torch.jit.load(str(tmp_path / "w.pt"))
    with pytest.raises(
        WeightsError, match=r"more than tensors \(a method __setstate__\), and code .* not run"
    ):
        build_tower("evl-tiny", str(tmp_path / "w.pt"))


@pytest.mark.filterwarnings("ignore:.*torch.jit.* deprecated")
def test_a_torchscript_archive_of_much_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: State
) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "w.pt"))
    with pytest.raises(WeightsError, match="holds no image tower"):  # it is read
        build_tower("evl-tiny", str(tmp_path / "w.pt"))
    monkeypatch.setattr("evl_cache.towers.weights_file._MOST_SOURCE", 100)
    with pytest.raises(WeightsError, match="not run"):
        build_tower("evl-tiny", str(tmp_path / "w.pt"))


def test_names_that_are_one_without_wrappers_parts_stay_two(tiny: State, tmp_path: Path) -> None:
    wrapped = {f"module.{name}": value + 1 for name, value in tiny.items()}
    said = refused({**tiny, **wrapped}, tmp_path / "w.pt")
    assert "2 towers that fit and differ: 'module.' and names without a prefix" in said


def test_a_long_name_of_an_object_is_cut(tmp_path: Path) -> None:
    module, name = "m" * 4000, "n" * 4000
    torch.save({"args": Recipe()}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        for entry, content in entries.items():
            named = f"c{Recipe.__module__}\nRecipe\n".encode()
            archive.writestr(entry, content.replace(named, f"c{module}\n{name}\n".encode()))
    with pytest.raises(WeightsError, match=r"more than tensors \(m{80}…\)") as raised:
        build_tower("evl-tiny", str(tmp_path / "w.pt"))
    assert len(str(raised.value)) < 400


def test_a_name_that_lacks_behind_a_prefix_is_told(tiny: State, tmp_path: Path) -> None:
    lacking = {name: value for name, value in tiny.items() if name != MLP}
    said = refused({"model": behind("module.image_encoder.", lacking)}, tmp_path / "w.pt")
    assert f"missing ['{MLP}']" in said and "'module.image_encoder.' in ['model']" in said
    assert "holds no image tower" not in said
    without_stem = {name: value for name, value in tiny.items() if name != "conv1.weight"}
    assert "missing ['conv1.weight']" in refused(behind("backbone.", without_stem), tmp_path / "w.pt")


def test_names_that_the_tower_lacks_are_refused_unless_they_are_a_classifiers(
    tiny: State, tmp_path: Path
) -> None:
    assert "not in the model ['ln_extra.weight']" in refused(
        {**tiny, "ln_extra.weight": torch.ones(2)}, tmp_path / "w.pt"
    )


class Recipe:
    """An object of somebody's training script."""


class Runs:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("zipped", [True, False])
def test_other_objects_are_one_plain_line_and_no_code_is_run(
    tiny: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (Recipe(), Runs(), argparse.Namespace(inner=Runs()), np.array([Runs()], dtype=object)):
        torch.save({"model": tiny, "args": content}, "w.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            WeightsError, match=r"holds more than tensors \([\w.]+\).*save the state dict alone"
        ) as raised:
            build_tower("evl-tiny", "w.pt")
        assert "weights_only" not in str(raised.value) and "\n" not in str(raised.value)
    assert not Path("exploded").exists()


class Constructed:
    """What a hostile file says of an object that is passed over: its class is called with anything."""

    def __init__(self, kind: Any, *values: Any) -> None:
        self.kind, self.values = kind, values

    def __reduce__(self) -> Any:
        return (self.kind, self.values, {"anything": 1})


def test_what_a_file_says_of_objects_that_are_passed_over_reaches_none_of_their_classes(
    tiny: State, tmp_path: Path
) -> None:
    forged = Constructed(np.dtype, "no such type", 7)
    torch.save({"model": tiny, "args": forged}, tmp_path / "w.pt")  # numpy would raise
    tower = build_tower("evl-tiny", str(tmp_path / "w.pt"))
    assert torch.equal(tower.visual.state_dict()[MLP], tiny[MLP])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"", "it is empty"),
        (pickle.dumps({"a": 1})[:-3], "damaged, cut short"),
    ],
)
def test_what_is_no_weights_file_says_what_it_is(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=told):
        build_tower("evl-tiny", str(tmp_path / "w.pt"))


def test_a_timm_tower_is_found_behind_a_prefix_with_its_classifier_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "timm/vit_tiny_patch16_224@64"
    visual, spec = build_tower(name, "none")
    state = {**visual.state_dict(), "head.weight": torch.zeros(3, 192), "head.bias": torch.zeros(3)}
    torch.save({"teacher": behind("module.backbone.", state)}, tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING, logger="evl_cache"):
        assert build_tower(name, str(tmp_path / "w.pt")).spec.weights_sha256 == spec.weights_sha256
    assert (
        "'module.backbone.' in ['teacher']" in caplog.text
        and "left out head.weight, head.bias" in caplog.text
    )


def test_authors_names_are_converted_behind_a_prefix_beside_what_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    name = "timm/vit_tiny_patch16_224@64"
    visual, spec = build_tower(name, "none")
    module = sys.modules[type(visual).__module__]

    def authors(state: State, model: object) -> State:
        if "patch_embed.proj.weight" not in state or len(state) == 1:
            raise KeyError("patch_embed.proj.bias")
        return {n.replace("layers.", "blocks."): value for n, value in state.items()}

    monkeypatch.setattr(module, "checkpoint_filter_fn", authors)
    state = {n.replace("blocks.", "layers."): value for n, value in visual.state_dict().items()}
    alone = {"decoder.patch_embed.proj.weight": torch.zeros(1)}
    torch.save({"model": {**alone, **behind("encoder.", state)}}, tmp_path / "w.pt")
    assert build_tower(name, str(tmp_path / "w.pt")).spec.weights_sha256 == spec.weights_sha256
    torch.save(alone, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="timm cannot convert them"):
        build_tower(name, str(tmp_path / "w.pt"))
