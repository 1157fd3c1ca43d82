"""What lower precision costs the EVL head against float32: `python -m benchmarks.precision --json`.

Generated features at ViT-B/16's sizes (8 frames, 14 x 14 patches), a head of drawn weights: motion tables, convolution
and positions are not zero, and attention is as peaked as a trained head's. For each precision, each a share of one:

- maps: relative error of maps decoded from their codes;
- attention_weights: relative error of the weights that a decoder layer gives the tokens;
- class_logits: relative error of the head's output, of what differs between classes;
- gradients: relative error of a parameter's gradient, the mean over all parameters.

Relative errors are norms: |got - exact| / |exact|. The plain twin under the same autocast stands beside. Attention
weights never leave the head, so they are read from its output: see `AttentionProbe`. tf32 is null without a GPU.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.outlier_features import softmax_maps
from benchmarks.support.machine import machine
from evl_cache.errors import UsageError
from evl_cache.heads import EVLHead, PlainHead, decoded_maps
from evl_cache.precision import PRECISIONS, check_precision, computing, tf32_as
from evl_cache.quantize import (
    QuantizedMaps,
    QuantizedTokens,
    dequantize_maps,
    dequantize_tokens,
    quantize_maps,
    quantize_tokens,
)

LOGITS_DEVIATION = 3.0  # of a query's attention logits over tokens: the attention lies on about 60 of 1,576
LOSS_SCALE = {"float16": 2.0**10}  # as training has it: float16's gradients would vanish


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of features and head. `markers`: channels that an `AttentionProbe` reads weights by."""

    clips: int = 2
    frames: int = 8
    grid: tuple[int, int] = (14, 14)
    width: int = 768
    heads: int = 12
    layers: int = 4
    classes: int = 400
    markers: int = 64

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A head and its features: tokens (B, T, 1+P, C) and maps (B, 2, T-1, P, P) of each layer, and labels (B,)."""

    head: EVLHead
    tokens: list[QuantizedTokens]
    maps: list[QuantizedMaps]
    labels: Tensor


def drawn_case(shape: Shape, generator: torch.Generator) -> Case:
    """A head whose parameters are all drawn, and quantised features for it."""
    head = new_head(shape, shape.layers, shape.heads, shape.width)
    with torch.no_grad():
        head.class_query.copy_(normal(generator, shape.width))
        for layer in head.layers:
            draw_temporal(layer, generator, channels=shape.width)
            layer.q_proj.weight.copy_(normal(generator, *layer.q_proj.weight.shape) * LOGITS_DEVIATION)
            layer.k_proj.weight.copy_(normal(generator, *layer.k_proj.weight.shape))
            for projection in (layer.q_proj, layer.k_proj):
                projection.weight.div_(shape.width**0.5)
    tokens = normal(generator, shape.layers, shape.clips, shape.frames, 1 + shape.patches, shape.width)
    return Case(
        head=head,
        tokens=[quantize_tokens(t) for t in tokens],
        maps=[quantize_maps(m) for m in drawn_maps(shape)],
        labels=torch.randint(shape.classes, (shape.clips,), generator=generator),
    )


def new_head(shape: Shape, layers: int, heads: int, qkv_width: int) -> EVLHead:
    return EVLHead(
        num_layers=layers,
        width=shape.width,
        num_frames=shape.frames,
        grid=shape.grid,
        num_classes=shape.classes,
        num_heads=heads,
        qkv_width=qkv_width,
        dropout=0.0,
    )


def draw_temporal(layer: nn.Module, generator: torch.Generator, *, channels: int) -> None:
    """Draw what the temporal modules add to the first channels, about as large as tokens; the others get zero."""
    parameters = dict(layer.named_parameters())
    for name, size in {
        "conv.weight": 0.5,
        "conv.bias": 0.1,
        "pos_embed": 0.5,
        "motion_prev": 1,
        "motion_next": 1,
    }.items():
        parameter = parameters[name]
        along = 0 if name.startswith("conv") else -1
        parameter.copy_(normal(generator, *parameter.shape) * size)
        parameter.narrow(along, channels, parameter.shape[along] - channels).zero_()


def drawn_maps(shape: Shape) -> Tensor:
    """Maps (layers, B, 2, T-1, P, P), some rows flat and some peaked."""
    maps = softmax_maps(
        clips=shape.clips, frames=shape.frames, patches=shape.patches, layers=shape.layers, seed=0
    )
    return maps.transpose(0, 1).contiguous()


def normal(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(*size, generator=generator)


class AttentionProbe:
    """A head of one decoder layer that writes its attention weights into its output, and tokens for it.

    Some channels are markers: the query is blind to them, and no temporal module adds to them. Every token has one
    marker, of the same size whichever it is, so that its norm and its logit do not depend on which. The value of a
    marker is then the weight of the token that has it. One clip is asked several times, until every token has had a
    marker of its own. The values leave the layer's output projection, which copies them, for the last norm. What comes
    after the attention has float64 parameters, which autocast leaves alone, so that reading rounds nothing.
    """

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        self.count, self.readable = shape.frames * (1 + shape.patches), shape.markers - 2
        self.heads = shape.width // shape.markers
        self.head = new_head(shape, 1, self.heads, self.heads * shape.markers)
        self.turns = math.ceil(self.count / self.readable)
        plain = shape.width - shape.markers  # channels that are no markers come first
        self._draw_head(plain, shape, generator)
        tokens = normal(generator, shape.clips, 1, shape.frames, 1 + shape.patches, plain)
        marked = self._markers(shape).expand(shape.clips, -1, -1, -1, -1)
        tokens = torch.cat([tokens.expand(-1, self.turns, -1, -1, -1), marked], -1)
        self.tokens = tokens.flatten(0, 1)  # (B turns,T,1+P,C)
        self.maps = drawn_maps(shape)[0].repeat_interleave(self.turns, 0)
        scale = LOGITS_DEVIATION / float(self.exact().log().flatten(2).std(-1).mean())
        with torch.no_grad():
            self.head.layers[0].q_proj.weight.mul_(scale)

    def _draw_head(self, plain: int, shape: Shape, generator: torch.Generator) -> None:
        (layer,) = self.head.layers
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.zero_()
            for norm in (layer.norm1, layer.norm2, layer.norm3, self.head.norm):
                norm.weight.fill_(1.0)
            draw_temporal(layer, generator, channels=plain)
            layer.norm1.bias.copy_(
                normal(generator, shape.width)
            )  # all of the query, as the class query is zero
            layer.q_proj.weight.copy_(normal(generator, *layer.q_proj.weight.shape) / shape.width**0.5)
            keys = normal(generator, len(layer.k_proj.weight), plain)
            layer.k_proj.weight[:, :plain] = (keys - keys.mean(-1, keepdim=True)) / shape.width**0.5
            for row in range(len(layer.v_proj.weight)):
                marker = row % shape.markers
                if marker < self.readable:
                    layer.v_proj.weight[row, plain + marker] = 1
                    layer.v_proj.weight[
                        row, -1
                    ] = -1  # no token has the last marker: this is what zero has become
            layer.out_proj.weight.fill_diagonal_(1.0)
        for after in (layer.v_proj, layer.out_proj, layer.norm2, layer.fc1, layer.fc2, self.head.norm):
            after.double()
        self.head.classifier.double()

    def _markers(self, shape: Shape) -> Tensor:
        """Marker channels in each turn, (turns, T, 1+P, markers); who has no marker of its own has the last but one."""
        own = torch.arange(self.count) - self.readable * torch.arange(self.turns)[:, None]
        own = torch.where((own >= 0) & (own < self.readable), own, self.readable)
        markers = nn.functional.one_hot(own, shape.markers) * shape.width**0.5 / 2
        return markers.view(self.turns, shape.frames, 1 + shape.patches, -1)

    def exact(self) -> Tensor:
        """The weights (B, H, T, 1+P) that the plain twin gives in float32."""
        turn = slice(0, None, self.turns)
        (weights,) = PlainHead(self.head).attention([self.tokens[turn]], [self.maps[turn]])
        return weights

    def read(self, precision: str) -> Tensor:
        """Weights as the head writes them, (B, H, T (1+P)), each times a factor that is its token's own."""
        written: list[Tensor] = []
        hook = self.head.norm.register_forward_pre_hook(lambda norm, inputs: written.append(inputs[0]))
        with torch.no_grad(), computing(precision, self.tokens.device):
            self.head([self.tokens], [self.maps])
        hook.remove()
        (values,) = written
        markers = values[:, : len(self.head.layers[0].v_proj.weight)]
        by_turn = markers.view(-1, self.turns, self.heads, self.readable + 2)[..., : self.readable]
        return by_turn.transpose(1, 2).flatten(2)[..., : self.count]

    def to(self, device: torch.device) -> "AttentionProbe":
        """Move everything, and return this."""
        self.head.to(device)
        self.tokens, self.maps = self.tokens.to(device), self.maps.to(device)
        return self

    def weights(self, precision: str) -> Tensor:
        """The weights in a precision, (B, H, T (1+P))."""
        query = self.head.layers[0].q_proj.weight
        before = query.detach().clone()
        with torch.no_grad():
            query.zero_()  # all tokens weigh the same
            equal = self.read("float32") * self.count
            query.copy_(before)
        return self.read(precision) / equal

    def error(self, precision: str) -> float:
        """The relative error of a query's weights in a precision, the mean over clips and attention heads."""
        exact = self.exact().flatten(2)
        return float(((self.weights(precision) - exact).norm(dim=-1) / exact.norm(dim=-1)).mean())


def relative(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact|, in double precision."""
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def maps_error(maps: Sequence[QuantizedMaps], precision: str) -> float:
    """The relative error of maps as a head decodes them to multiply them."""
    dtype = PRECISIONS[precision].autocast_dtype or torch.float32
    got = torch.stack([decoded_maps(m, dtype).float() for m in maps])
    return relative(got, torch.stack([dequantize_maps(m.codes, m.row_max) for m in maps]))


def logits_and_gradients(
    head: nn.Module, features: tuple[Sequence[object], Sequence[object]], labels: Tensor, precision: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits less their mean over classes (B, classes), and every parameter's gradient, as in a training step."""
    head.zero_grad()
    scale = LOSS_SCALE.get(precision, 1.0)
    with tf32_as(precision, labels.device):
        with computing(precision, labels.device):
            logits = head(*features).float()
        (nn.functional.cross_entropy(logits, labels) * scale).backward()
    # Nothing depends on a key's bias: what its gradient is else is rounding.
    names = (name for name, p in head.named_parameters() if p.grad is not None and "k_proj.bias" not in name)
    parameters = dict(head.named_parameters())
    gradients = {name: parameters[name].grad.float() / scale for name in names}  # type: ignore[union-attr]
    return (logits - logits.mean(-1, keepdim=True)).detach(), gradients


def head_errors(
    head: nn.Module, features: tuple[Sequence[object], Sequence[object]], labels: Tensor, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Errors of class logits and gradients, by precision."""
    exact_logits, exact = logits_and_gradients(head, features, labels, "float32")
    found = {}
    for name in names:
        logits, gradients = logits_and_gradients(head, features, labels, name)
        errors = [relative(gradients[parameter], exact[parameter]) for parameter in exact]
        found[name] = {
            "class_logits": relative(logits, exact_logits),
            "gradients": sum(errors) / len(errors),
        }
    return found


def measure(shape: Shape, device: torch.device) -> dict[str, object]:
    """All errors, by precision; None for a precision that the device cannot compute in."""
    torch.manual_seed(0)  # heads draw from it what is not drawn below
    generator = torch.Generator().manual_seed(0)
    case, probe = drawn_case(shape, generator), AttentionProbe(shape, generator).to(device)
    head, labels = case.head.to(device), case.labels.to(device)
    tokens = [moved(t, device) for t in case.tokens]
    maps = [moved(m, device) for m in case.maps]
    names = [name for name in PRECISIONS if name != "float32" and is_possible(name, device)]
    ours = head_errors(head, (tokens, maps), labels, names)
    floats = (
        [dequantize_tokens(t.codes, t.affine, t.scale) for t in tokens],
        [dequantize_maps(m.codes, m.row_max) for m in maps],
    )
    twin = head_errors(PlainHead(head), floats, labels, names)
    result: dict[str, object] = {name: None for name in PRECISIONS if name != "float32"}
    for name in names:
        result[name] = {"maps": maps_error(maps, name), "attention_weights": probe.error(name), **ours[name]}
    exact = probe.exact().flatten(2)
    perplexity = torch.exp(-(exact * exact.log()).sum(-1)).mean()
    return result | {"plain_twin": twin, "tokens_that_hold_the_attention": float(perplexity)}


def moved(stored: Any, device: torch.device) -> Any:
    """Codes on a device."""
    values = {field.name: getattr(stored, field.name) for field in fields(stored)}
    return replace(stored, **{name: None if v is None else v.to(device) for name, v in values.items()})


def is_possible(name: str, device: torch.device) -> bool:
    try:
        check_precision(name, device)
    except UsageError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the result's JSON object alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=Shape.clips)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if not options.json:
        print(__doc__)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result = measure(Shape(clips=options.clips), device)
    print(json.dumps(result | {"device": where, "machine": machine()}))


if __name__ == "__main__":
    main()
