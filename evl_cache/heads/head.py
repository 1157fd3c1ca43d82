"""The base of all heads: a module that turns cached features of some layers into class logits.

B clips, T frames, P patches (grid Hp x Wp), N = 1+P tokens of a frame, C channels, L layers. docs/heads.md says how
to write one.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from evl_cache.errors import UsageError
from evl_cache.heads.layer_tokens import LayerTokens, layer_tokens
from evl_cache.quantize import QuantizedMaps, QuantizedTokens

Tokens = Tensor | QuantizedTokens | LayerTokens
Maps = Tensor | QuantizedMaps

# The temporal modules that --no-temporal-… switches off. A head has some of them, or none.
MODULES = ("temporal_conv", "temporal_pos_embed", "temporal_cross_attention")


class Head(nn.Module):
    """The base class of heads, which checks their sizes.

    A subclass makes its parameters after `super().__init__`, and defines `logits`.

    Args:
        num_layers: layers it reads, L.
        width: channels C of the backbone's tokens.
        num_frames: frames T of a view.
        grid: patches (Hp, Wp).
        num_classes: outputs.
        num_heads: attention heads; width / 64 by default, as published.
        dropout: probability before the classifier.
        more: arguments of the subclass, kept in `config`.

    Attributes:
        config: every argument by name, as a run directory keeps it.
        default_depth: how many of the last layers it reads where none are named; None means all that are cached.
        takes_other_depths: whether `--head-layers` may name another number of layers.
        temporal_modules: those of `MODULES` that it has; each is an argument of that name.
        class_tokens_only: whether it reads the frames' class tokens only, a two-hundredth of the bytes.

    Raises: UsageError where sizes contradict each other.
    """

    default_depth: ClassVar[int | None] = None
    takes_other_depths: ClassVar[bool] = True
    temporal_modules: ClassVar[tuple[str, ...]] = ()
    class_tokens_only: ClassVar[bool] = False

    def __init__(
        self,
        *,
        num_layers: int,
        width: int,
        num_frames: int,
        grid: tuple[int, int],
        num_classes: int,
        num_heads: int | None = None,
        dropout: float = 0.5,
        **more: Any,
    ) -> None:
        super().__init__()
        num_heads = max(1, width // 64) if num_heads is None else num_heads
        sizes = {
            "num_layers": num_layers,
            "width": width,
            "num_frames": num_frames,
            "num_classes": num_classes,
            "num_heads": num_heads,
        }
        for name, value in sizes.items():
            if value < 1:
                raise UsageError(f"{name} is {value}; expected at least 1")
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout is {dropout}; expected 0 <= dropout < 1")
        self.config: dict[str, Any] = {**sizes, "grid": tuple(grid), "dropout": dropout, **more}
        self.num_layers, self.width, self.num_classes = num_layers, width, num_classes
        self.num_frames, self.num_heads = num_frames, num_heads
        self.grid = int(grid[0]), int(grid[1])

    @property
    def reads_maps(self) -> bool:
        """Whether it needs adjacent-frame maps as it is set now."""
        return False

    @property
    def has_idle_parameters(self) -> bool:
        """Whether a step may leave some parameters without a gradient."""
        return False

    def logits(self, tokens: Sequence[LayerTokens]) -> Tensor:
        """Return class logits (B, num_classes) from the tokens of each layer, shallow to deep."""
        raise NotImplementedError

    def forward(self, tokens: Sequence[Tokens], maps: Sequence[Maps] | None = None) -> Tensor:
        """Return class logits (B, num_classes) from cached features. No argument is changed.

        Args:
            tokens: one for each layer, shallow to deep, (B, T, 1+P, C), class token first. Floating, 8-bit codes, or
                `LayerTokens` that heads share. (B, T, 1, C) is enough for a head that reads class tokens only.
            maps: one for each layer, (B, 2, T-1, P, P), floating or 8-bit codes; only for heads that read them.

        Raises: UsageError for a list or shape that is not this head's.
        """
        self.check_tokens(tokens)
        return self.logits([layer_tokens(t) for t in tokens])

    def check_tokens(self, tokens: Sequence[Tokens]) -> None:
        """Check the number and shapes of tokens. Raises: UsageError where they are not this head's."""
        if len(tokens) != self.num_layers:
            raise UsageError(
                f"got tokens of {len(tokens)} layers; this head has {self.num_layers} layers: give tokens of each"
            )
        clips = stored_values(tokens[0]).shape[0]  # no `len`, which makes a number of a size that is to vary
        expected = (clips, self.num_frames, 1 + self.grid[0] * self.grid[1], self.width)
        for t in tokens:
            shape = tuple(stored_values(t).shape)
            if self.class_tokens_only and shape[2:3] == (1,):
                shape = (*shape[:2], expected[2], *shape[3:])
            check_shape("tokens", "(B, T, 1+P, C)", shape, expected)
            check_floating("tokens", t)


def stored_values(feature: Tokens | Maps) -> Tensor:
    """Return the tensor that has a feature's shape: its values, or its codes."""
    if isinstance(feature, LayerTokens):
        return stored_values(feature.stored)
    return feature if isinstance(feature, Tensor) else feature.codes


def check_shape(name: str, axes: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Check one feature's shape. Raises: UsageError where it is not the expected one."""
    if shape != expected:
        raise UsageError(f"{name} are {shape}; this head expects {axes} = {expected}")


def check_floating(name: str, feature: Tokens | Maps) -> None:
    """Check a feature's dtype. Raises: UsageError for codes without their scales."""
    if isinstance(feature, Tensor) and not feature.is_floating_point():
        raise UsageError(
            f"{name} are {feature.dtype}; expected floating-point ones, or codes together with their scales as "
            f"Quantized{name.title()}"
        )
