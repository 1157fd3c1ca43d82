"""Weights of one tower in every kind of file, and every way in which they can be wrong."""

import json
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from evl_cache.errors import WeightsError, WeightsUnavailable
from evl_cache.towers import build_tower
from evl_cache.towers.pretrained import find_weights
from evl_cache.towers.weights import read_tower_weights

VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 2.0}


def write_model(path: Path, *, quick_gelu=True, **changes) -> str:
    config = {"embed_dim": 12, "quick_gelu": quick_gelu, "vision_cfg": {**VISION, **changes}}
    path.write_text(json.dumps(config))
    return str(path)


@pytest.fixture
def model(tmp_path) -> str:
    return write_model(tmp_path / "tiny.json")


@pytest.fixture
def state(model) -> dict[str, torch.Tensor]:
    """Weights that are not those of `none`, and exact in float16."""
    visual, _ = build_tower(model, "none")
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(value.shape, generator=generator).half().float()
        for name, value in visual.state_dict().items()
    }


def whole_clip(state) -> dict[str, torch.Tensor]:
    """As CLIP's checkpoints are: the tower under `visual.`, the text tower beside it."""
    text = {"token_embedding.weight": torch.zeros(5, 4), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    return (
        {f"visual.{name}": value for name, value in state.items()} | text | {"logit_scale": torch.tensor(1.0)}
    )


class Holder(nn.Module):
    """A module with given parameter names, dots and all."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            *parents, leaf = name.split(".")
            module = self
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, nn.Module())
                module = module._modules[parent]
            module.register_parameter(leaf, nn.Parameter(value.clone(), requires_grad=False))

    def forward(self, x):
        return x


def write_archive(path, state):
    """A TorchScript archive as OpenAI published them: float16, whole CLIP, and sizes as buffers."""
    clip = Holder({name: value.half() for name, value in whole_clip(state).items()})
    clip.register_buffer("input_resolution", torch.tensor(32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(clip, torch.zeros(1)).save(str(path))


WRITERS = {
    "tower.safetensors": lambda path, state: save_file(state, path),
    "clip.safetensors": lambda path, state: save_file(whole_clip(state), path),
    "tower.pt": lambda path, state: torch.save(state, path),
    "clip.pt": lambda path, state: torch.save(whole_clip(state), path),
    "wrapped.pt": lambda path, state: torch.save(
        {"epoch": 3, "name": "x", "state_dict": whole_clip(state)}, path
    ),
    "parallel.pt": lambda path, state: torch.save(
        {"state_dict": {f"module.{n}": v for n, v in whole_clip(state).items()}}, path
    ),
    "half.pt": lambda path, state: torch.save({n: v.half() for n, v in whole_clip(state).items()}, path),
    "legacy.bin": lambda path, state: torch.save(state, path, _use_new_zipfile_serialization=False),
    "parameters.pt": lambda path, state: torch.save({n: nn.Parameter(v) for n, v in state.items()}, path),
    "openai.pt": write_archive,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_tower_and_the_same_digest(tmp_path, model, state, kind):
    save_file(state, tmp_path / "expected.safetensors")
    _, expected = build_tower(model, str(tmp_path / "expected.safetensors"))
    WRITERS[kind](tmp_path / kind, state)
    visual, spec = build_tower(model, str(tmp_path / kind))
    assert spec.weights_sha256 == expected.weights_sha256
    assert spec.pretrained == kind
    for name, value in visual.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[name])


def test_half_precision_weights_are_read_as_the_file_has_them(tmp_path, state):
    for kind in ("half.pt", "openai.pt"):
        WRITERS[kind](tmp_path / kind, state)
        found = read_tower_weights(tmp_path / kind)
        assert found.is_openai_archive == (kind == "openai.pt")
        (tower,) = found.candidates(state)
        assert tower.tensors.keys() == state.keys() and tower.fits(state)
        assert all(
            v.dtype == torch.float16 and torch.equal(v.float(), state[n]) for n, v in tower.tensors.items()
        )


def test_other_weights_have_another_digest(tmp_path, model, state):
    save_file(state, tmp_path / "a.safetensors")
    changed = {name: value.clone() for name, value in state.items()}
    changed["ln_pre.bias"][0] += 1
    save_file(changed, tmp_path / "b.safetensors")
    digests = {
        build_tower(model, p)[1].weights_sha256 for p in ("none", *map(str, tmp_path.glob("*.safetensors")))
    }
    assert len(digests) == 3


def test_an_openai_archive_needs_a_quick_gelu_model(tmp_path, state):
    write_archive(tmp_path / "ViT-B-16.pt", state)
    plain = write_model(tmp_path / "plain.json", quick_gelu=False)
    with pytest.raises(WeightsError, match=r"QuickGELU mismatch.*trained with it.*plain.json is without"):
        build_tower(plain, str(tmp_path / "ViT-B-16.pt"))


def test_weights_of_another_model_are_refused_naming_both_shapes(tmp_path, model, state):
    save_file(state, tmp_path / "w.safetensors")
    wider = write_model(tmp_path / "wider.json", width=64)
    with pytest.raises(WeightsError, match=r"is \(32,\), expected \(64,\).*choose the --model"):
        build_tower(wider, str(tmp_path / "w.safetensors"))
    deeper = write_model(tmp_path / "deeper.json", layers=3)
    with pytest.raises(WeightsError, match=r"missing \['transformer\.resblocks\.2\..*12 missing"):
        build_tower(deeper, str(tmp_path / "w.safetensors"))
    shallower = write_model(tmp_path / "shallower.json", layers=1)
    with pytest.raises(WeightsError, match=r"not in the model \['transformer\.resblocks\.1\..*12 extra"):
        build_tower(shallower, str(tmp_path / "w.safetensors"))


def test_a_file_without_an_image_tower_is_refused(tmp_path, model):
    torch.save({"head.weight": torch.zeros(3)}, tmp_path / "head.pt")
    with pytest.raises(WeightsError, match="holds no image tower"):
        build_tower(model, str(tmp_path / "head.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="holds a list; expected a state dict"):
        build_tower(model, str(tmp_path / "list.pt"))


def garbage() -> dict[str, bytes]:
    generator = torch.Generator().manual_seed(0)
    noise = bytes(torch.randint(0, 256, (3000,), generator=generator, dtype=torch.uint8).tolist())
    cases = {f"noise{i}.pt": noise[7 * i :] for i in range(20)}
    cases |= {f"pickle{i}.pt": b"\x80\x02" + noise[11 * i :] for i in range(20)}
    cases |= {f"opcode{i}.pt": bytes([i]) + b"." for i in range(0, 256, 5)}
    cases |= {"empty.pt": b"", "text.pt": b"version https://git-lfs.example/spec\n", "empty.safetensors": b""}
    cases |= {"noise.safetensors": noise, "html.bin": b"<!DOCTYPE html><html>not found</html>"}
    return cases


def test_garbage_files_are_refused_in_one_line(tmp_path, model):
    for name, content in garbage().items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError) as raised:
            build_tower(model, str(tmp_path / name))
        assert "\n" not in str(raised.value) and name in str(raised.value)


def test_cut_files_are_refused_in_one_line(tmp_path, model, state):
    for kind, write in WRITERS.items():
        write(tmp_path / kind, state)
        content = (tmp_path / kind).read_bytes()
        for share in (0.1, 0.5, 0.99):
            (tmp_path / kind).write_bytes(content[: int(len(content) * share)])
            with pytest.raises(WeightsError) as raised:
                build_tower(model, str(tmp_path / kind))
            assert "\n" not in str(raised.value)


def test_a_zip_of_other_things_is_refused(tmp_path, model):
    for name, inside in (("a.pt", "hello.txt"), ("b.pt", "x/constants.pkl"), ("c.pt", "x/data.pkl")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(inside, "hello")
        with pytest.raises(WeightsError, match="cannot be read as weights"):
            build_tower(model, str(tmp_path / name))


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_code_in_a_pickle_is_not_run(tmp_path, model, state, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**state, "bomb": Bomb()}, "bomb.pt")
    Path("plain.pkl").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pt", "plain.pkl"):
        with pytest.raises(WeightsError, match="cannot be read as weights"):
            build_tower(model, name)
    assert not Path("exploded").exists()


def test_what_is_neither_file_nor_tag_lists_the_tags():
    with pytest.raises(
        WeightsError, match=r"'opanai' is neither a file nor a tag of RN50; expected one of .*openai"
    ):
        find_weights("RN50", "opanai", {"quick_gelu": True})


def test_a_missing_file_for_a_model_file_says_so(model):
    with pytest.raises(WeightsError, match=r"'nothing\.pt' is neither a file nor a tag"):
        build_tower(model, "nothing.pt")


@pytest.fixture
def small_models(monkeypatch):
    """ViT-B-32 and its QuickGELU twin, by their names and tags, but small."""
    import open_clip

    configs = {
        "ViT-B-32": {"embed_dim": 12, "vision_cfg": VISION},
        "ViT-B-32-quickgelu": {"embed_dim": 12, "vision_cfg": VISION, "quick_gelu": True},
    }
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: configs[name])


@pytest.fixture
def served(monkeypatch, tmp_path, state):
    """The hub gives `state` for every tag; what was asked for is returned."""
    asked = []

    def download(config, **options):
        asked.append(config)
        save_file(whole_clip(state), tmp_path / "served.safetensors")
        return str(tmp_path / "served.safetensors")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", download)
    return asked


def test_a_quick_gelu_mismatch_of_a_tag_is_an_error_before_any_download(small_models, served, monkeypatch):
    from open_clip.pretrained import _PRETRAINED

    with pytest.raises(WeightsError, match=r"QuickGELU mismatch.*use --model ViT-B-32-quickgelu$"):
        build_tower("ViT-B-32", "openai")
    monkeypatch.setitem(
        _PRETRAINED["ViT-B-32-quickgelu"], "laion2b_e16", _PRETRAINED["ViT-B-32"]["laion2b_e16"]
    )
    with pytest.raises(WeightsError, match=r"trained without it.*use --model ViT-B-32$"):
        build_tower("ViT-B-32-quickgelu", "laion2b_e16")
    assert served == []


def test_mean_and_std_come_from_the_tag(small_models, served, monkeypatch, state):
    from open_clip.pretrained import _PRETRAINED

    visual, spec = build_tower("ViT-B-32-quickgelu", "openai")
    assert spec.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    assert torch.equal(visual.conv1.weight, state["conv1.weight"]) and len(served) == 1
    other = {**_PRETRAINED["ViT-B-32-quickgelu"]["openai"], "mean": (0.5, 0.5, 0.5), "std": (0.4, 0.5, 0.6)}
    monkeypatch.setitem(_PRETRAINED["ViT-B-32-quickgelu"], "openai", other)
    _, halves = build_tower("ViT-B-32-quickgelu", "openai")
    assert (halves.mean, halves.std) == ((0.5, 0.5, 0.5), (0.4, 0.5, 0.6))
    assert halves.weights_sha256 == spec.weights_sha256


def test_a_tag_without_network_is_one_line_with_ways_out(small_models, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def no_network(*args, **options):
        raise LocalEntryNotFoundError(
            "cannot find the file on the Hub\nand no copy of it\nin the local cache"
        )

    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", no_network)
    with pytest.raises(
        WeightsUnavailable, match=r"could not be downloaded .*--pretrained FILE.*HF_HOME"
    ) as raised:
        build_tower("ViT-B-32-quickgelu", "openai")
    assert "\n" not in str(raised.value)


def test_a_bad_url_download_is_one_line_too(small_models, monkeypatch):
    import urllib.error

    def refused(*args, **options):
        raise urllib.error.URLError("name or service not known")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", refused)
    with pytest.raises(WeightsUnavailable, match="name or service not known"):
        build_tower("ViT-B-32-quickgelu", "openai")


@pytest.mark.parametrize("reachable", [True, False])
def test_without_a_network_the_hub_is_not_asked_again_and_again(monkeypatch, reachable):
    from huggingface_hub import constants

    before, seen = constants.HF_HUB_OFFLINE, []

    def look_up(*arguments: object, **keywords: object) -> list[object]:
        if not reachable:
            raise OSError("Name or service not known")
        return []

    def download(tag: object) -> str:
        seen.append(constants.HF_HUB_OFFLINE)
        raise OSError("not here")

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    monkeypatch.setattr("evl_cache.towers.pretrained.getproxies", dict)
    monkeypatch.setattr("open_clip.pretrained.download_pretrained", download)
    with pytest.raises(WeightsUnavailable, match="could not be downloaded"):
        build_tower("ViT-B-32", "laion2b_s34b_b79k")
    assert seen == [before or not reachable]
    assert before == constants.HF_HUB_OFFLINE
