"""What every head is: a module that turns cached features of some blocks into class logits.

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

# What --no-temporal-… switches off; a head has some of them, or none.
MODULES = ("temporal_conv", "temporal_pos_embed", "temporal_cross_attention")


class Head(nn.Module):
    """The sizes of a head, checked. A subclass makes its parameters after `super().__init__` and gives `logits`.

    Args:
        num_layers: blocks it reads, L.
        width: channels C of the backbone's tokens.
        num_frames: frames T of a view.
        grid: patches (Hp, Wp).
        num_classes: outputs.
        num_heads: attention heads; width / 64 by default, as published.
        dropout: probability before the classifier.
        more: other arguments of the subclass, kept in `config`.

    Attributes:
        config: every argument, by name: what a run directory keeps.
        default_depth: blocks it reads, the last ones, where nobody says; None: all that are cached.
        takes_other_depths: whether `--head-layers` may name another number of blocks.
        temporal_modules: of `MODULES`, which it has; each is an argument of that name.
        class_tokens_only: it reads no token but the frames' class tokens, a two-hundredth of the bytes.

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
        """Whether it needs adjacent-frame maps as it is now."""
        return False

    @property
    def has_idle_parameters(self) -> bool:
        """Whether a step may leave some parameters without a gradient."""
        return False

    def logits(self, tokens: Sequence[LayerTokens]) -> Tensor:
        """Class logits (B, num_classes) from the tokens of each layer, shallow to deep."""
        raise NotImplementedError

    def forward(self, tokens: Sequence[Tokens], maps: Sequence[Maps] | None = None) -> Tensor:
        """Class logits from cached features, shallow to deep. No argument is changed.

        Args:
            tokens: one (B, T, 1+P, C) for each layer, class token first: floating, 8-bit codes, or what heads share;
                (B, T, 1, C) is enough for a head that reads class tokens only.
            maps: one (B, 2, T-1, P, P) for each, likewise; only for heads that read them.

        Returns: (B, num_classes).
        Raises: UsageError for a list or shape that is not this head's.
        """
        self.check_tokens(tokens)
        return self.logits([layer_tokens(t) for t in tokens])

    def check_tokens(self, tokens: Sequence[Tokens]) -> None:
        """Raises: UsageError for a list or shape that is not this head's."""
        if len(tokens) != self.num_layers:
            raise UsageError(f"got tokens of {len(tokens)} layers; this head has {self.num_layers} layers")
        clips = len(stored_values(tokens[0]))
        expected = (clips, self.num_frames, 1 + self.grid[0] * self.grid[1], self.width)
        for t in tokens:
            shape = tuple(stored_values(t).shape)
            if self.class_tokens_only and shape[2:3] == (1,):
                shape = (*shape[:2], expected[2], *shape[3:])
            check_shape("tokens", "(B, T, 1+P, C)", shape, expected)
            check_floating("tokens", t)


def stored_values(feature: Tokens | Maps) -> Tensor:
    """The tensor that has a feature's shape: its values, or its codes."""
    if isinstance(feature, LayerTokens):
        return stored_values(feature.stored)
    return feature if isinstance(feature, Tensor) else feature.codes


def check_shape(name: str, axes: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises: UsageError naming both."""
    if shape != expected:
        raise UsageError(f"{name} are {shape}; this head expects {axes} = {expected}")


def check_floating(name: str, feature: Tokens | Maps) -> None:
    """Raises: UsageError for codes without their scales."""
    if isinstance(feature, Tensor) and not feature.is_floating_point():
        raise UsageError(
            f"{name} are {feature.dtype}; expected floating-point ones, or codes together with their scales as "
            f"Quantized{name.title()}"
        )
