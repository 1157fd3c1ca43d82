"""Generated features that lie on a device, and training steps of heads on them.

B clips, T frames, P patches, C channels, L layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.support.device_place import Place, Sizes
from evl_cache.heads.decoder.evl import EVLHead
from evl_cache.heads.decoder.plain import PlainHead
from evl_cache.quantize import QuantizedMaps, QuantizedTokens

Inputs = tuple[Sequence[Any], Sequence[Any]]


def new_decoder(sizes: Sizes, device: str, *, seed: int = 0) -> EVLHead:
    """A decoder whose temporal modules do something: positions and motion tables begin at zero otherwise."""
    torch.manual_seed(seed)
    head = EVLHead(
        num_layers=sizes.layers,
        width=sizes.width,
        num_frames=sizes.frames,
        grid=sizes.grid,
        num_classes=sizes.classes,
        num_heads=sizes.heads,
    )
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "motion" in name or "pos_embed" in name or name == "class_query":
                parameter.normal_(std=0.5 if "motion" in name else 0.1)
    return head.to(device)


def stored_features(sizes: Sizes, batch: int, device: str, *, seed: int = 0) -> Inputs:
    """Codes as a cache holds them; tokens have deviation 1, the rows of maps sum to about 1."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens, maps = [], []
    for _ in range(sizes.layers):
        shape = (batch, sizes.frames, 1 + sizes.patches, sizes.width)
        codes = torch.randint(-128, 128, shape, dtype=torch.int8, device=device, generator=generator)
        affine = (
            torch.tensor([1 / 74, 0.0], device=device)[:, None].expand(batch, 2, sizes.width).contiguous()
        )
        affine = affine * (0.5 + torch.rand(affine.shape, device=device, generator=generator))
        scale = torch.ones(shape[:-1], dtype=torch.float16, device=device)
        scale[:, :, -1] = 4.0  # an outlier token in each frame
        tokens.append(QuantizedTokens(codes=codes, affine=affine, scale=scale))
        if sizes.frames > 1:
            map_shape = (batch, 2, sizes.frames - 1, sizes.patches, sizes.patches)
            roots = torch.randint(0, 256, map_shape, dtype=torch.uint8, device=device, generator=generator)
            row_max = torch.full(map_shape[:-1], 3 / sizes.patches, dtype=torch.float16, device=device)
            maps.append(QuantizedMaps(codes=roots, row_max=row_max))
    return tokens, maps


def decoded(inputs: Inputs, dtype: torch.dtype, *, part: int = 64) -> Inputs:
    """The same features as a plain head takes them, floating."""
    tokens = [
        torch.cat(
            [
                _plain_tokens(t.codes[i : i + part], t.affine[i : i + part], t.scale[i : i + part]).to(dtype)
                for i in range(0, len(t.codes), part)
            ]
        )
        for t in inputs[0]
    ]
    maps = [
        torch.cat(
            [
                (
                    (m.codes[i : i + part].float() / 255).square()
                    * m.row_max[i : i + part, ..., None].float()
                ).to(dtype)
                for i in range(0, len(m.codes), part)
            ]
        )
        for m in inputs[1]
    ]
    return tokens, maps


def _plain_tokens(codes: Tensor, affine: Tensor, scale: Tensor) -> Tensor:
    values = codes.float() * affine[:, 0, None, None] + affine[:, 1, None, None]
    return values * scale.float()[..., None]


def nbytes(inputs: Inputs) -> int:
    """The bytes of features."""
    fields: list[Tensor] = []
    for each in (*inputs[0], *inputs[1]):
        held = (each,) if isinstance(each, Tensor) else vars(each).values()
        fields += [value for value in held if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in fields)


@dataclass(frozen=True, kw_only=True)
class Side:
    """A head, and the features that it takes.

    Attributes:
        head: a decoder or its plain twin, or either compiled.
        inputs: of a batch.
        precision: of the forward pass.
    """

    head: nn.Module
    inputs: Inputs
    precision: str

    def step(self, place: Place) -> Callable[[], None]:
        """Return a training step: forward, backward, AdamW, and a loss scaler for float16."""
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=4e-4, weight_decay=0.05, fused=True)
        scaler = torch.amp.GradScaler(torch.device(place.device).type, enabled=self.precision == "float16")
        labels = torch.zeros(len(_first(self.inputs)), dtype=torch.int64, device=place.device)

        def step() -> None:
            with place.autocast(self.precision):
                logits = self.head(*self.inputs)
            scaler.scale(F.cross_entropy(logits.float(), labels)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

        return step


def _first(inputs: Inputs) -> Tensor:
    first = inputs[0][0]
    return first if isinstance(first, Tensor) else first.codes


def ours_and_twin(place: Place, batch: int, precision: str) -> tuple[Side, Side]:
    """Our head on codes, and its plain twin on floating features, which need not be decoded: that favours the twin."""
    inputs = stored_features(place.sizes, batch, place.device)
    head = new_decoder(place.sizes, place.device)
    kept = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)
    twin = Side(head=PlainHead(head), inputs=decoded(inputs, kept), precision=precision)
    return Side(head=head, inputs=inputs, precision=precision), twin


def known_paths(place: Place) -> list[str]:
    """Names of the ways to compute the decoder's attention that this device has, the fastest first."""
    try:
        from evl_cache.heads.decoder import paths
    except ImportError:
        return []
    wanted = ("kernels", "whole") if place.is_gpu else ("chunked", "whole")
    return [name for name in wanted if name in paths.PATHS]


@contextmanager
def by_path(name: str | None) -> Iterator[None]:
    """Have the decoder computed in one way; None leaves the choice to it."""
    if name is None:
        yield
        return
    from evl_cache.heads.decoder import paths

    with paths.forced(name):
        yield


def through(step: Callable[[], None], path: str | None) -> Callable[[], None]:
    """Return a step that is computed in one way."""

    def call() -> None:
        with by_path(path):
            step()

    return call


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Let float32 products be computed with TF32, or not."""
    try:
        from evl_cache.precision import tf32_as
    except ImportError:
        pass
    else:
        with tf32_as("tf32" if on else "float32", "cuda" if torch.cuda.is_available() else "cpu"):
            yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
