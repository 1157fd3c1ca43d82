"""Whether the kernels compute an attention: they must suit the inputs, and have been proved on such inputs on this device.

B clips, T frames, C channels, H heads.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from evl_cache.heads.decoder.tensors import LayerTensors, Setting, SharedTensors, slices_of
from evl_cache.heads.decoder.whole import path as whole
from evl_cache.precision import tf32_as, tf32_is_on

OLDEST_CARD = (8, 0)  # matrix instructions for bfloat16
MOST_CHANNELS = 1280
MOST_HEADS = 32
MOST_FRAMES = 64
MOST_CLIPS = 65_535  # of one launch, a limit of CUDA's grids
PROOF_CLIPS = 3
# Errors against float32, of the largest value. A wrong address, tap or sign errs by the order of 1. Where tokens are much
# alike, a gradient is a small difference of large numbers, and rounding alone errs by more: by how much, `whole` tells.
TOLERANCE = {torch.float32: 2e-2, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # TF32 is as coarse as float16
TIMES_OF_WHOLE = 4.0

_proved: dict[tuple[Any, ...], bool] = {}


def suits(setting: Setting, inputs: LayerTensors) -> bool:
    """Whether the kernels can compute this on its device, by its dtypes, sizes and wanted gradients."""
    clip = inputs.clips
    assert clip.query is not None and clip.tokens is not None
    return (
        _device_suits(setting.device)
        # A compiler or a counter passes tensors without memory, of a class of their own.
        and type(clip.tokens) in (Tensor, torch.nn.Parameter)
        and setting.products in TOLERANCE
        # Without matrix instructions torch's own products of float32 are the faster ones.
        and (setting.products != torch.float32 or tf32_is_on())
        and setting.sums == torch.float32
        and not clip.tokens.requires_grad
        and not (clip.maps is not None and clip.maps.requires_grad)
        and clip.tokens.shape[3] <= MOST_CHANNELS
        and clip.tokens.shape[1] <= MOST_FRAMES
        and clip.query.shape[1] <= MOST_HEADS
        and 0 < len(clip.query) <= MOST_CLIPS
    )


def are_proved(setting: Setting, inputs: LayerTensors) -> bool:
    """Whether the kernels give what `whole` gives on such inputs; tried on a few clips when it is first asked.

    Where they do not, or do not run, it is said once as a warning.
    """
    key = _kind(setting, inputs)
    if key not in _proved:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False  # nothing may be compared in the middle of a capture
        try:
            objection = _objection(setting, inputs)
        except FloatingPointError:
            return False  # features that are not finite prove nothing
        _proved[key] = objection is None
        if objection is not None:
            warnings.warn(
                f"the decoder's Triton kernels are not used here ({objection}); it runs on torch's own operations, "
                "more slowly",
                RuntimeWarning,
                stacklevel=2,
            )
    return _proved[key]


def _kind(setting: Setting, inputs: LayerTensors) -> tuple[Any, ...]:
    """What distinguishes compiled kernels: the device, and everything but the number of clips."""
    sizes = [None if t is None else (t.dtype, *t.shape[1:]) for t in inputs.clips]
    shared = [t is None for t in inputs.shared]
    switches = (setting.products, setting.keep, tf32_is_on())
    return (str(setting.device), setting.grid, *switches, *sizes, *shared)


def _objection(setting: Setting, inputs: LayerTensors) -> str | None:
    """Say why the kernels are not to be used on such inputs; None where they are right."""
    try:
        return _difference(setting, inputs)
    except (FloatingPointError, torch.OutOfMemoryError):
        raise  # neither says anything of the kernels
    except Exception as error:  # whatever a compiler, a driver or a card says: the other path goes on
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"


def _difference(setting: Setting, inputs: LayerTensors) -> str | None:
    """Say which result for the first clips errs by more than rounding explains, or None."""
    from evl_cache.heads.decoder.kernels import path as kernels

    few = _few_clips(inputs)
    with tf32_as("float32", setting.device):
        exact = _results(whole.forward, whole.backward, replace(setting, products=setting.sums), few)
    ours, theirs = (_results(path.forward, path.backward, setting, few) for path in (kernels, whole))
    for name, expected in exact.items():
        allowed = max(TOLERANCE[setting.products], TIMES_OF_WHOLE * _error(theirs[name], expected))
        if not _error(ours[name], expected) <= allowed:
            return f"their {name} is not that of torch's operations"
    return None


def _few_clips(inputs: LayerTensors) -> LayerTensors:
    """Return the first clips, with a query and tables of fixed values: those of a new head are zero, and prove little."""
    query = inputs.clips.query
    assert query is not None
    ((clips, shared),) = slices_of(inputs, [min(PROOF_CLIPS, len(query))])
    drawn = _waves(query[:PROOF_CLIPS])
    centred = (drawn - drawn.mean(-1, keepdim=True)) * query.shape[-1] ** -0.5
    tables = (None if tensor is None else _waves(tensor) for tensor in shared)
    return LayerTensors(clips._replace(query=centred), SharedTensors(*tables))


def _waves(like: Tensor) -> Tensor:
    """Return values between -1 and 1 that repeat nowhere, in the shape of a tensor."""
    return torch.arange(like.numel(), device=like.device, dtype=like.dtype).cos_().view_as(like)


def _results(
    forward: Callable[..., tuple[Tensor, Sequence[Tensor]]],
    backward: Callable[..., LayerTensors],
    setting: Setting,
    inputs: LayerTensors,
) -> dict[str, Tensor]:
    """The mean, and where there will be a backward pass all gradients for some gradient of the mean."""
    mean, kept = forward(setting, inputs)
    results = {"mean": mean}
    if not setting.keep:
        return results
    gradient = _waves(mean)
    needed = frozenset(("query", *SharedTensors._fields))
    found = backward(setting, inputs, kept, gradient, needed, again=False)
    named = {"query": found.clips.query, **found.shared._asdict()}
    return results | {f"gradient of {name}": value for name, value in named.items() if value is not None}


def _error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a share of the largest value; NaN where a result has one.

    Raises: FloatingPointError where what is expected is not finite.
    """
    if not bool(expected.isfinite().all()):
        raise FloatingPointError
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-20))


@cache
def _device_suits(device: torch.device) -> bool:
    """Whether there is a card that the kernels are written for, and Triton to compile them."""
    return (
        device.type == "cuda"
        and torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= OLDEST_CARD
        and find_spec("triton") is not None
    )
