"""What PyAV's FFmpeg says against a file while it is read and decoded."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import av

_STREAM = re.compile(r"stream (\d+)[,:]")  # how demuxers begin what concerns one stream
_UNHEARD = logging.getLogger("libav")  # PyAV's


@dataclass(frozen=True)
class Message:
    """What a demuxer, parser or decoder, whose name is `source`, said."""

    source: str
    text: str

    def is_of(self, container: "av.container.InputContainer") -> bool:
        """Whether the demuxer said it, so that packets may be missing."""
        return self.source == container.format.name


class Listener:
    """Takes complaints as they come."""

    def __init__(self, captured: list[tuple[int, str, str]]) -> None:
        self._captured = captured
        self._others: set[str] = set()
        self._index: int | None = None

    def attend(self, container: "av.container.InputContainer", stream: "av.VideoStream") -> None:
        """Leave out from now on what concerns other streams of a file, such as its sound."""
        contexts = [other.codec_context for other in container.streams if other is not stream]
        self._others = {context.name for context in contexts if context is not None}  # type: ignore[redundant-expr]
        self._others.discard(stream.codec_context.name)
        self._index = stream.index

    def _is_wanted(self, source: str, text: str) -> bool:
        named = _STREAM.match(text)
        is_of_other = named is not None and self._index is not None and int(named[1]) != self._index
        return source not in self._others and not is_of_other

    def take(self) -> list[Message]:
        """Return what was said since the last call. That a picture is concealed is a remark only, but counts."""
        import av

        found = [
            Message(source, text.strip()[:160])
            for level, source, text in self._captured
            if (level <= av.logging.ERROR or text.startswith("concealing")) and self._is_wanted(source, text)
        ]
        self._captured.clear()
        return found


@contextmanager
def listening() -> Iterator[Listener]:
    """Hear what FFmpeg says in this thread meanwhile; nothing of it is printed."""
    import av

    if not _UNHEARD.handlers:  # what is said in between is printed by no one
        _UNHEARD.addHandler(logging.NullHandler())
    av.logging.set_level(av.logging.INFO)  # concealed pictures are told of as a remark
    av.logging.set_skip_repeated(False)  # a second pass over a file says the same again
    with av.logging.Capture() as captured:
        yield Listener(captured)
