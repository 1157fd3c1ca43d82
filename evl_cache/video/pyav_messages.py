"""What PyAV's FFmpeg says against a file while it is read and decoded."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import av

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

    def take(self) -> list[Message]:
        """Return what was said since the last call. That a picture is concealed is a remark only, but counts."""
        import av

        found = [
            Message(source, text.strip()[:160])
            for level, source, text in self._captured
            if level <= av.logging.ERROR or text.startswith("concealing")
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
