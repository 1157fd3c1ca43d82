"""The options of extract on a command line: from the package's table to click's options, and back to a request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import click

from evl_cache.extract_options import ExtractOption, Role, options_with
from evl_cache.notation import parse_layers
from evl_cache.spec import SOFTWARE_PIXELS

from .common import Function, say

if TYPE_CHECKING:
    from evl_cache.extract import ExtractRequest, SplitsRead
    from evl_cache.video import DecodeOptions


def extract_flags(options: Iterable[ExtractOption]) -> Callable[[Function], Function]:
    """Return the decorator that gives a command these options, in their order."""
    chosen = tuple(options)

    def add(function: Function) -> Function:
        for option in reversed(chosen):
            flags = filter(None, (option.flag, option.alias, option.parameter))
            function = click.option(*flags, **_settings(option))(function)
        return function

    return add


def hidden_flag(option: ExtractOption) -> click.Option:
    """Return the option as one that works and is not in the help."""
    return click.Option([option.flag, option.parameter], hidden=True, **_settings(option))


def _settings(option: ExtractOption) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "help": option.help,
        "metavar": option.metavar,
        "required": option.is_required,
        "show_default": option.shows_default,
    }
    if option.default is not None:
        settings["default"] = option.default
    if option.kind is bool:
        return settings | {"is_flag": True}
    if option.choices:
        return settings | {"type": click.Choice(option.choices)}
    if option.kind is Path:
        return settings | {"type": click.Path(path_type=Path)}
    if option.word:
        return settings | {"type": _NumberOr(option.word)}
    return settings | {
        "type": option.kind if option.least is None else click.IntRange(option.least, option.most)
    }


class _NumberOr(click.ParamType[int | str]):
    """A whole number, or one word."""

    name = "number"

    def __init__(self, word: str) -> None:
        self._word = word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Return the number, or the word."""
        if value == self._word or isinstance(value, int):
            return value  # type: ignore[no-any-return]
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor {self._word}", param, ctx)


class Decoding(TypedDict):
    """How videos are decoded, by the names that the package's functions have for it."""

    decoding: DecodeOptions
    clip_timeout_s: float


def decoding_of(device: str, decoder: str, tolerate_bad_frames: bool, clip_timeout: float | None) -> Decoding:
    """Return the package's options of the command's. `device`: where torchcodec decodes."""
    from evl_cache.video import DecodeOptions
    from evl_cache.video.pool import DEFAULT_TIMEOUT_S

    return {
        "decoding": DecodeOptions(decoder=decoder, tolerate_bad_frames=tolerate_bad_frames, device=device),
        "clip_timeout_s": DEFAULT_TIMEOUT_S if clip_timeout is None else clip_timeout,
    }


def make_request(given: Mapping[str, Any], *, pixels: str = SOFTWARE_PIXELS) -> ExtractRequest:
    """Return the request of the options that a command was given; what it does not take has its default."""
    from evl_cache.extract import ExtractRequest

    values = {o.field: given[o.parameter] for o in options_with(Role.REQUEST) if o.parameter in given}
    if values["layers"] is not None:
        values["layers"] = parse_layers(values["layers"])
    return ExtractRequest(**values, pixels=pixels)


def say_read(read: SplitsRead) -> None:
    """Say what was understood of clips: what `evl-cache check` says, in short."""
    from evl_cache.extract.check import check_splits

    for split in check_splits(read):
        for line in split.in_short:
            say(line, err=True)
