"""Precisions: what each sets in torch and puts back, which one a device gets, and which it cannot do."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from evl_cache import precision as module
from evl_cache.batches import FeatureLoader
from evl_cache.errors import UsageError
from evl_cache.extract.job import ExtractOptions
from evl_cache.precision import (
    PRECISIONS,
    check_precision,
    computing,
    default_precision,
    device_named,
    precision_of_run,
    tf32_as,
    tf32_is_on,
)
from evl_cache.runs import head_logits, load_head, score
from evl_cache.runs.evaluate import evaluate
from evl_cache.store import FeatureCache
from evl_cache.sweep import sweep
from evl_cache.sweep.grid import expand
from evl_cache.train.batch_size import training_step
from evl_cache.train.optimisation import Optimisation
from evl_cache.train.stage import TrainOptions, train
from evl_cache_cli.common import default_device
from tests.support.feature_caches import write_pair

OPTIONS = TrainOptions(head="decoder2", epochs=1, batch=4, lr=3e-3)

SetCard = Callable[[tuple[int, int]], None]
Pair = tuple[FeatureCache, FeatureCache]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SetCard:
    """Say what compute capability every GPU has."""

    def set_capability(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return set_capability


@pytest.fixture(autouse=True)
def _switches_as_before() -> Iterator[None]:
    backends = torch.backends
    owners = [backends, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]  # type: ignore[attr-defined]
    before = [owner.fp32_precision for owner in owners]
    yield
    for owner, value in zip(owners, before, strict=True):
        owner.fp32_precision = value


@pytest.fixture
def cpu_with_tf32(monkeypatch: pytest.MonkeyPatch, card: SetCard) -> None:
    """Take the CPU for a GPU that has TF32: torch's switches turn, and no product here heeds them."""
    monkeypatch.setattr(module, "_is_gpu", lambda device: True)
    card((8, 0))


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("caches"))


def switches() -> tuple[bool, bool, bool]:
    """Whether TF32 is on in matrix products, cuDNN's convolutions, and its recurrent layers."""
    cudnn = torch.backends.cudnn
    owners = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)  # type: ignore[attr-defined]
    on = tuple(owner.fp32_precision == "tf32" for owner in owners)
    return on[0], on[1], on[2]


ON, OFF = (True, True, True), (False, False, False)
AS_TORCH_STARTS = (False, True, True)


@pytest.mark.parametrize(("name", "within"), [("tf32", ON), ("float32", OFF), ("bfloat16", OFF)])
def test_tf32_is_on_or_off_in_products_and_in_cudnn_and_then_as_before(
    name: str, within: tuple[bool, bool, bool]
) -> None:
    assert switches() == AS_TORCH_STARTS
    with tf32_as(name, "cuda"):
        assert switches() == within
    assert switches() == AS_TORCH_STARTS


def test_tf32_may_be_set_inside_of_itself() -> None:
    with tf32_as("tf32", "cuda:1"):
        with tf32_as("float32", "cuda:1"):
            assert switches() == OFF
            with tf32_as("float32", "cuda:1"):
                assert switches() == OFF
            assert switches() == OFF
        assert switches() == ON


def test_an_error_puts_the_switches_back() -> None:
    with pytest.raises(ZeroDivisionError), tf32_as("tf32", "cuda"):
        _ = 1 // 0
    assert switches() == AS_TORCH_STARTS


def test_kernels_of_our_own_can_ask_whether_tf32_is_on() -> None:
    found = {}
    for name in PRECISIONS:
        with tf32_as(name, "cuda"):
            found[name] = tf32_is_on()
    assert found == {"float32": False, "tf32": True, "bfloat16": False, "float16": False}
    assert not tf32_is_on()


def test_the_decoders_kernels_multiply_float32_only_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    from evl_cache.heads.decoder.kernels import choice
    from evl_cache.heads.decoder.tensors import ClipTensors, LayerTensors, Setting, SharedTensors
    from evl_cache.heads.decoder.workspace import Workspace

    monkeypatch.setattr(choice, "_device_suits", lambda device: True)
    clips = ClipTensors(query=torch.zeros(1, 2, 8), tokens=torch.zeros(1, 2, 5, 8))
    inputs = LayerTensors(clips, SharedTensors(None, None, None, None))
    setting = Setting(
        grid=(2, 2),
        epsilon=1e-5,
        device=torch.device("cuda"),
        sums=torch.float32,
        products=torch.float32,
        keep=False,
        workspace=Workspace(),
    )
    found = {}
    for name in ("float32", "tf32"):
        with tf32_as(name, "cuda"):
            found[name] = choice.suits(setting, inputs)
    assert found == {"float32": False, "tf32": True}


def test_nothing_is_switched_on_a_cpu() -> None:
    with tf32_as("float32", "cpu"):
        assert switches() == AS_TORCH_STARTS


@pytest.mark.parametrize("legacy", [False, True])
def test_torchs_older_flags_can_be_read_after_a_precision_was_set(legacy: bool) -> None:
    """Torch raises where it finds that one of the two ways was used to set, and the other way says otherwise."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some releases of torch call the older flags deprecated
        was = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        try:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = legacy
            for name in PRECISIONS:
                with tf32_as(name, "cuda"):
                    pass
            assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == legacy
            assert torch.get_float32_matmul_precision() == ("high" if legacy else "highest")
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = was


def test_a_switch_that_followed_torchs_general_setting_follows_it_again() -> None:
    backends: Any = torch.backends
    backends.cuda.matmul.fp32_precision = "none"
    backends.fp32_precision = "tf32"
    with tf32_as("float32", "cuda"):
        assert switches() == OFF
    assert switches() == ON
    backends.fp32_precision = "ieee"
    assert not switches()[0]


def test_a_torch_without_the_newer_switches_has_the_older_ones_set(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul, cudnn = SimpleNamespace(allow_tf32=False), SimpleNamespace(allow_tf32=True)  # as torch 2.8
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    found = []
    for name in ("tf32", "float32"):
        with tf32_as(name, "cuda"):
            found.append((matmul.allow_tf32, cudnn.allow_tf32))
    assert found == [(True, True), (False, False)]
    assert (matmul.allow_tf32, cudnn.allow_tf32) == (False, True)


# Which one


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 0), "float16"),
        ((7, 5), "float16"),
        ((8, 0), "bfloat16"),
        ((8, 9), "bfloat16"),
        ((12, 0), "bfloat16"),
    ],
)
def test_a_gpu_gets_bfloat16_where_it_is_native_and_else_float16(
    card: SetCard, capability: tuple[int, int], expected: str
) -> None:
    card(capability)
    assert [default_precision(device) for device in ("cuda", "cuda:1")] == [expected] * 2
    assert default_precision("cpu") == "float32"


def test_the_default_of_a_gpu_that_is_not_there_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: object = None) -> None:
        raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.setattr(torch.cuda, "get_device_capability", missing)
    assert default_precision("cuda") == "bfloat16"


@pytest.mark.parametrize(
    ("trained", "device", "capability", "expected"),
    [
        # trained on, in; scored on
        (("cuda", "bfloat16"), "cuda:1", (8, 0), "bfloat16"),
        (("cuda", "float32"), "cuda", (8, 0), "float32"),
        (("cuda", "tf32"), "cuda", (9, 0), "tf32"),
        (("cuda", "tf32"), "cuda", (7, 5), "float16"),
        (("cuda", "float16"), "cuda", (8, 0), "float16"),
        (("cuda", "bfloat16"), "cpu", (8, 0), "float32"),
        (("cuda", "tf32"), "cpu", (8, 0), "float32"),
        (("cpu", "bfloat16"), "cpu", (8, 0), "bfloat16"),
        (("cpu", "float32"), "cuda", (8, 0), "float32"),
        (("cpu", "bfloat16"), "cuda", (7, 5), "float16"),
        (("cuda:0", "bfloat16"), "cuda", (7, 5), "bfloat16"),  # it was asked for, on a card that emulates it
        (("cuda", "int4"), "cuda", (8, 0), "bfloat16"),
        (("cuda", 16), "cpu", (8, 0), "float32"),
    ],
)
def test_a_run_is_scored_in_its_trainings_precision_where_the_device_has_it(
    monkeypatch: pytest.MonkeyPatch,
    card: SetCard,
    trained: tuple[str, Any],
    device: str,
    capability: tuple[int, int],
    expected: str,
) -> None:
    card(capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert precision_of_run({"device": trained[0], "precision": trained[1]}, device) == expected


def test_an_imported_head_records_no_precision_and_gets_the_devices(card: SetCard) -> None:
    card((8, 0))
    assert [precision_of_run({}, device) for device in ("cpu", "cuda")] == ["float32", "bfloat16"]


# What a device cannot do


def test_what_every_device_can_do_is_no_error(card: SetCard) -> None:
    card((8, 6))
    for name in PRECISIONS:
        check_precision(name, "cuda")
    for name in ("float32", "bfloat16", "float16"):
        check_precision(name, "cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tf32_where_there_is_none_names_the_remedy(card: SetCard, device: str) -> None:
    card((7, 5))
    with pytest.raises(
        UsageError, match=rf"tf32 on {device}, .*capability 8\.0 or newer; use --precision float32"
    ):
        check_precision("tf32", device)


def test_bfloat16_is_refused_only_where_torch_does_not_even_emulate_it(
    monkeypatch: pytest.MonkeyPatch, card: SetCard
) -> None:
    card((7, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    check_precision("bfloat16", "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(UsageError, match=r"bfloat16 on cuda, .*use --precision float16"):
        check_precision("bfloat16", "cuda")


def test_an_unknown_precision_is_told_what_there_is() -> None:
    with pytest.raises(UsageError, match="'fp8'; expected one of float32, tf32, bfloat16, float16"):
        check_precision("fp8", "cpu")
    with pytest.raises(UsageError, match="'fp8'; expected one of"):
        TrainOptions(epochs=1, precision="fp8")


@pytest.mark.parametrize("command", ["train", "sweep", "evaluate", "head_logits"])
def test_a_precision_that_the_device_lacks_is_refused_before_anything_is_written(
    caches: Pair, tmp_path: Path, command: str
) -> None:
    run = tmp_path / "run"
    if command in ("evaluate", "head_logits"):
        train(*caches, options=OPTIONS, out=run)
    with pytest.raises(UsageError, match="tf32 on cpu"):
        if command == "train":
            train(*caches, options=replace(OPTIONS, precision="tf32"), out=run)
        elif command == "sweep":
            common = {"epochs": 1, "batch": 4, "precision": "tf32"}
            sweep(*caches, runs=expand([{"head": "linear"}], common), out=run)
        elif command == "evaluate":
            evaluate(run, caches[1], precision="tf32")
        else:
            head_logits(load_head(run), caches[1].read_stored([0]), "tf32")
    if command in ("train", "sweep"):
        assert not run.exists() or not any(run.iterdir())


# Where it reaches


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, cpu_with_tf32: None) -> dict[str, set[tuple[bool, bool, bool]]]:
    """How the switches stand in forward passes, in backward passes and where maps are made, of all that follows."""
    found: dict[str, set[tuple[bool, bool, bool]]] = {"forward": set(), "backward": set(), "maps": set()}

    def noted(place: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            found[place].add(switches())
            return real(*args, **more)

        return call

    from evl_cache.heads import EVLHead
    from evl_cache.store import StoredBatch

    monkeypatch.setattr(EVLHead, "forward", noted("forward", EVLHead.forward))
    monkeypatch.setattr(Optimisation, "backward", noted("backward", Optimisation.backward))
    monkeypatch.setattr(StoredBatch, "with_made_maps", noted("maps", StoredBatch.with_made_maps))
    return found


@pytest.mark.parametrize(("name", "expected"), [("tf32", ON), ("float32", OFF)])
def test_training_and_validation_compute_in_it(
    caches: Pair, tmp_path: Path, seen: dict[str, Any], name: str, expected: tuple[bool, ...]
) -> None:
    train(*caches, options=replace(OPTIONS, precision=name), out=tmp_path / "run")
    assert seen == {"forward": {expected}, "backward": {expected}, "maps": {expected}}


@pytest.mark.parametrize(("name", "expected"), [("tf32", ON), ("float32", OFF)])
def test_a_sweep_computes_in_it_too(
    caches: Pair, tmp_path: Path, seen: dict[str, Any], name: str, expected: tuple[bool, ...]
) -> None:
    common = {"epochs": 1, "batch": 4, "precision": name}
    sweep(*caches, runs=expand([{"head": "decoder2", "seed": [0, 1]}], common), out=tmp_path / "sweep")
    assert seen == {"forward": {expected}, "backward": {expected}, "maps": {expected}}


def test_the_step_that_a_batch_is_measured_by_computes_in_it(caches: Pair, seen: dict[str, Any]) -> None:
    from evl_cache.train import run_config, training_reads

    options = replace(OPTIONS, precision="tf32")
    reads = training_reads(options, caches[0].spec)
    head = run_config(caches[0], {}, options, reads.layers).build()
    training_step(head, caches[0].read_stored([0], reads), options, batch=2)
    assert seen == {"forward": {ON}, "backward": {ON}, "maps": {ON}}


def test_scoring_a_run_computes_in_its_trainings_precision_unless_told(
    caches: Pair, tmp_path: Path, seen: dict[str, Any]
) -> None:
    train(*caches, options=replace(OPTIONS, precision="tf32"), out=tmp_path / "run")
    for asked, expected, name in ((None, ON, "tf32"), ("float32", OFF, "float32")):
        seen["forward"].clear()
        assert evaluate(tmp_path / "run", caches[1], precision=asked).precision == name
        assert seen["forward"] == {expected}


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_eval_says_what_the_validation_of_the_training_said(caches: Pair, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    train(*caches, options=replace(OPTIONS, precision=name), out=run)
    found = evaluate(run, caches[1], batch=4)
    head, cache = load_head(run), caches[1]
    loader = FeatureLoader(cache, np.arange(len(cache)), layers=(3, 4), batch=4)
    scores = score(head, loader, device=torch.device("cpu"), precision=name)
    exact = score(head, loader, device=torch.device("cpu"))
    assert (found.loss, found.precision) == (scores.loss, name)
    assert (found.loss == exact.loss) == (name == "float32")


def test_autocast_is_on_in_the_forward_pass_and_off_again(cpu_with_tf32: None) -> None:
    for name, precision in PRECISIONS.items():
        with computing(name, "cpu"):
            assert torch.is_autocast_enabled("cpu") == (precision.autocast_dtype is not None)
            if precision.autocast_dtype is not None:
                assert torch.get_autocast_dtype("cpu") == precision.autocast_dtype
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.gpu
def test_a_gpu_rounds_products_to_tf32_only_where_it_is_told_to() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a card with TF32")
    values = torch.randn(256, 256, device="cuda", dtype=torch.float64)
    exact = values @ values
    errors = {}
    for name in ("float32", "tf32"):
        with computing(name, "cuda"):
            errors[name] = float((values.float() @ values.float() - exact).norm() / exact.norm())
    assert errors["float32"] < 1e-6 < 1e-4 < errors["tf32"] < 2e-3


@pytest.mark.parametrize(
    ("name", "expected"), [("cpu", "cpu"), ("cpu:0", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda:1")]
)
def test_a_device_has_one_name_everywhere(name: str, expected: str) -> None:
    assert device_named(name) == expected
    assert TrainOptions(epochs=1, device=name).device == expected
    assert ExtractOptions(device=name).device == expected


@pytest.mark.parametrize("name", ["cpu:1", "mps", "meta", "CPU", "", "cuda:-1", "cuda:x"])
def test_a_device_that_is_none_here_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="expected cpu, cuda or cuda:N"):
        device_named(name)


def test_the_first_cpu_of_a_command_line_is_the_cpu() -> None:
    assert default_device("cpu:0") == "cpu"
