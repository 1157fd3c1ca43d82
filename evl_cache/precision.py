"""How exactly stage two computes: what each precision is to torch, which one suits a device, which a device can do.

TF32 is how CUDA cards from compute capability 8.0 on multiply float32: with 10 bits of mantissa, added up in float32.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from evl_cache.errors import UsageError

_AMPERE = (8, 0)  # the first compute capability with bfloat16 and TF32


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What a precision is to torch.

    Attributes:
        autocast_dtype: of large products in the forward pass, and with it in the backward pass; None leaves float32.
        tf32: whether products that are left in float32 may be computed in TF32.
    """

    autocast_dtype: torch.dtype | None = None
    tf32: bool = False


PRECISIONS: Mapping[str, Precision] = {
    "float32": Precision(),
    "tf32": Precision(tf32=True),
    "bfloat16": Precision(autocast_dtype=torch.bfloat16),
    "float16": Precision(autocast_dtype=torch.float16),
}


def device_named(name: str | torch.device) -> str:
    """Return the one name that a device has everywhere: `cpu` (for `cpu:0` too), `cuda` or `cuda:N`.

    Raises: UsageError for another.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cuda" or (device.type == "cpu" and not device.index):
        return "cpu" if device.type == "cpu" else str(device)
    raise UsageError(f"device {str(name)!r}; expected cpu, cuda or cuda:N")


def default_precision(device: str | torch.device) -> str:
    """Return the precision that suits a device: float32 on a CPU; on a GPU bfloat16, or float16 where it is emulated."""
    device = torch.device(device)
    if not _is_gpu(device):
        return "float32"
    return "bfloat16" if _is_native("bfloat16", device) else "float16"


def precision_of_run(training: Mapping[str, Any], device: str | torch.device) -> str:
    """Return the precision that a run is scored in on a device: that of its training, or the device's default.

    The default is taken where a run records none, where the device has no such arithmetic, and where it would only
    emulate what another kind of device was trained with: a CPU scores a GPU's run in float32.

    Args:
        training: the options that the run's `config.json` records.
    """
    device, recorded = torch.device(device), training.get("precision")
    if not isinstance(recorded, str) or _objection(recorded, device) is not None:
        return default_precision(device)
    trained_on_such = str(training.get("device")).partition(":")[0] == device.type
    return recorded if trained_on_such or _is_native(recorded, device) else default_precision(device)


def check_precision(name: str, device: str | torch.device) -> None:
    """Raises: UsageError where there is no such precision, or a device cannot compute in it."""
    objection = _objection(name, torch.device(device))
    if objection is not None:
        raise UsageError(objection)


@contextmanager
def tf32_as(name: str, device: str | torch.device) -> Iterator[None]:
    """Compute float32 products on a GPU in TF32 or not, as a precision says, then as before; nothing happens on a CPU.

    Torch's switches are those of the whole process: other threads compute alike meanwhile.
    """
    if not _is_gpu(torch.device(device)):
        yield
        return
    wanted = PRECISIONS[name].tf32
    changed = [switch for switch in _switches() if switch.is_on != wanted]
    before = [switch.value for switch in changed]
    try:
        for switch in changed:
            switch.turn(on=wanted)
        yield
    finally:
        for switch, value in zip(changed, before, strict=True):
            switch.restore(value)


def tf32_is_on() -> bool:
    """Whether float32 matrix products on a GPU may be computed in TF32 now, for kernels that are not torch's own.

    Torch's older `allow_tf32` must not be asked: it raises inside of `tf32_as`.
    """
    return _switches()[0].is_on


def tf32_of_towers() -> dict[str, bool]:
    """Whether a frozen tower's float32 products on a GPU may be computed in TF32 now: matrix products, convolutions."""
    matmul, convolution, *_ = _switches()
    return {"matmul": matmul.is_on, "convolution": convolution.is_on}


@contextmanager
def computing(name: str, device: str | torch.device) -> Iterator[None]:
    """Run a forward pass in a precision. A backward pass belongs outside of it, and inside of `tf32_as`.

    Raises: as `check_precision`.
    """
    device = torch.device(device)
    check_precision(name, device)
    dtype = PRECISIONS[name].autocast_dtype
    with tf32_as(name, device), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        yield


@dataclass(frozen=True)
class _Switch:
    """One of torch's switches of TF32.

    Attributes:
        owner: what torch has it on.
        name: `fp32_precision`, or `allow_tf32` before torch 2.9. A torch that has the first raises where the other
            is read after it was set, so a switch is only ever read and set by one of them.
    """

    owner: Any
    name: str

    @property
    def value(self) -> Any:
        return getattr(self.owner, self.name)

    @property
    def is_on(self) -> bool:
        return self.value in (True, "tf32")

    def turn(self, *, on: bool) -> None:
        values = (False, True) if self.name == "allow_tf32" else ("ieee", "tf32")
        setattr(self.owner, self.name, values[on])

    def restore(self, value: Any) -> None:
        """Set it to what it said. If torch's general setting says the same, the switch follows that again."""
        if self.name != "allow_tf32":
            setattr(self.owner, self.name, "none")
        if self.value != value:
            setattr(self.owner, self.name, value)


def _switches() -> list[_Switch]:
    """Torch's switches of TF32: of matrix products, and of cuDNN."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        return [_Switch(owner, "fp32_precision") for owner in (matmul, cudnn.conv, cudnn.rnn)]  # type: ignore[attr-defined]
    return [_Switch(owner, "allow_tf32") for owner in (matmul, cudnn)]


def _objection(name: str, device: torch.device) -> str | None:
    """Say why a device cannot compute in a precision, and what to do; None where it can."""
    if name not in PRECISIONS:
        return f"precision {name!r}; expected one of {', '.join(PRECISIONS)}"
    if name == "tf32" and not _is_native(name, device):
        return (
            f"precision tf32 on {device}, which has no TF32; expected a GPU of compute capability "
            f"{_AMPERE[0]}.{_AMPERE[1]} or newer; use --precision float32"
        )
    # Older cards compute in bfloat16 by other instructions, slowly. Torch knows which do so at all.
    is_emulated = name == "bfloat16" and _is_gpu(device) and not _is_native(name, device)
    if is_emulated and not torch.cuda.is_bf16_supported():
        return f"precision bfloat16 on {device}, which cannot compute in it; use --precision float16"
    return None


def _is_native(name: str, device: torch.device) -> bool:
    """Whether a device computes in a precision by its own instructions, as far as torch can tell."""
    if not _is_gpu(device):
        return name == "float32"
    if name in ("float32", "float16"):
        return True
    capability = _capability(device)
    return capability is None or capability >= _AMPERE


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU; None for one that is not there: whoever uses it is told so."""
    try:
        return torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError):
        return None
