"""Change bytes of video files where no muxer has an option for it: edit lists, display matrices, headers that lie."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Display matrices (a, b, c, d) of ISO 14496-12, 8.3.2: a pixel (x, y) is shown at (a x + c y, b x + d y).
ORIENTATIONS: dict[str, tuple[int, int, int, int]] = {
    "upright": (1, 0, 0, 1),
    "hflip": (-1, 0, 0, 1),
    "vflip": (1, 0, 0, -1),
    "turned180": (-1, 0, 0, -1),
    "transpose": (0, 1, 1, 0),
    "turned90": (0, 1, -1, 0),
    "turned270": (0, -1, 1, 0),
    "transverse": (0, -1, -1, 0),
}
_UUID_OF_X264 = bytes.fromhex("dc45e9bde6d948b7962cd820d923eeef")
TS_PACKET = 188


def shown(coded: np.ndarray, orientation: str) -> np.ndarray:
    """Return pictures as a display matrix shows them, (..., H, W, 3) to the same or (..., W, H, 3)."""
    a, b, c, d = ORIENTATIONS[orientation]
    picture = coded if a else np.swapaxes(coded, -2, -3)
    flips_x, flips_y = (a or c) < 0, (d or b) < 0
    return picture[..., :: -1 if flips_y else 1, :: -1 if flips_x else 1, :]


def as_coded(picture: np.ndarray, orientation: str) -> np.ndarray:
    """Return what `shown` was made from."""
    a, b, c, d = ORIENTATIONS[orientation]
    flips_x, flips_y = (a or c) < 0, (d or b) < 0
    picture = picture[..., :: -1 if flips_y else 1, :: -1 if flips_x else 1, :]
    return picture if a else np.swapaxes(picture, -2, -3)


def orient(path: Path, orientation: str, *, track: int = 0) -> None:
    """Write the display matrix of a track of an mp4."""
    a, b, c, d = (value << 16 for value in ORIENTATIONS[orientation])
    content = bytearray(path.read_bytes())
    at, _ = _box(content, "moov", ("trak", track), "tkhd")
    start = at + (40 if content[at] == 0 else 52)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def set_edits(
    path: Path, edits: list[tuple[int | None, int]], *, rate: int = 25, track: int = 0, version: int = 0
) -> None:
    """Give a track of an mp4 an edit list.

    Args:
        path: of the mp4, whose `moov` is its last box, as FFmpeg writes it.
        edits: first frame to be shown and how many; None as the first: that long nothing is shown. Empty: no list at all.
        rate: frames a second.
        track: its place in the file.
        version: of the box: 0 or 1 (64 bits).
    """
    content = bytearray(path.read_bytes())
    per_s = _number(content, _box(content, "moov", "mvhd")[0] + 12)
    media_per_s = _number(content, _box(content, "moov", ("trak", track), "mdia", "mdhd")[0] + 12)
    delay = 0  # media time of the first frame, which the muxer's own list tells
    if (found := _find(content, "moov", ("trak", track), "edts")) is not None:
        start, stop = found
        own, _ = _box(content, "moov", ("trak", track), "edts", "elst")
        for entry in range(_number(content, own + 4)):
            delay = max(delay, struct.unpack_from(">i", content, own + 8 + 12 * entry + 4)[0])
        _resize(content, start - 8 - stop, track)
        del content[start - 8 : stop]
    if edits:
        form = ">Iihh" if version == 0 else ">Qqhh"
        entries = b"".join(
            struct.pack(
                form,
                round(count * per_s / rate),
                -1 if first is None else delay + round(first * media_per_s / rate),
                1,
                0,
            )
            for first, count in edits
        )
        elst = struct.pack(">I4sBxxxI", 16 + len(entries), b"elst", version, len(edits)) + entries
        edts = struct.pack(">I4s", 8 + len(elst), b"edts") + elst
        _, behind = _box(content, "moov", ("trak", track), "tkhd")
        _resize(content, len(edts), track)
        content[behind:behind] = edts
    path.write_bytes(content)


def scale_mp4_durations(path: Path, factor: float, boxes: tuple[str, ...] = ("mvhd", "tkhd", "mdhd")) -> None:
    """Change what the headers of an mp4 say of its length; its sample tables stay."""
    content = bytearray(path.read_bytes())
    places = {
        "mvhd": _box(content, "moov", "mvhd")[0] + 16,
        "tkhd": _box(content, "moov", ("trak", 0), "tkhd")[0] + 20,
        "mdhd": _box(content, "moov", ("trak", 0), "mdia", "mdhd")[0] + 16,
    }
    for name in boxes:
        struct.pack_into(">I", content, places[name], round(_number(content, places[name]) * factor))
    path.write_bytes(content)


def rename_boxes(path: Path, *names: str) -> None:
    """Make boxes of an mp4 unknown to who reads it, as if the muxer had not written them."""
    content = path.read_bytes()
    for name in names:
        content = content.replace(name.encode(), b"free")
    path.write_bytes(content)


def scale_mkv_duration(path: Path, factor: float) -> None:
    """Change what the header of a Matroska file says of its length."""
    content = bytearray(path.read_bytes())
    at = content.index(b"\x44\x89\x88") + 3  # Duration, a float of 8 bytes
    struct.pack_into(">d", content, at, struct.unpack_from(">d", content, at)[0] * factor)
    path.write_bytes(content)


def scale_avi_length(path: Path, factor: float, *, boxes: tuple[str, ...] = ("avih", "strh")) -> None:
    """Change how many frames the headers of an AVI file say that it has."""
    content = bytearray(path.read_bytes())
    for name, offset in (("avih", 16), ("strh", 32)):
        if name in boxes:
            at = content.index(name.encode()) + 8 + offset
            struct.pack_into("<I", content, at, round(struct.unpack_from("<I", content, at)[0] * factor))
    path.write_bytes(content)


def cut_avi_index(path: Path) -> None:
    """Take the index of an AVI file away, as where recording was stopped."""
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"idx1")])


def damage_x264_note(path: Path, *, how: str) -> None:
    """Change one byte of the encoder's note beside the pictures (SEI 5): its `size`, its `text` or its `uuid`."""
    content = bytearray(path.read_bytes())
    at = content.index(_UUID_OF_X264)
    if how == "size":
        content[at - 1] ^= 0x40
    elif how == "text":
        content[at + 40] ^= 0x10
    else:
        content[at + 3] ^= 0x01
    path.write_bytes(content)


def cut_ts(path: Path, first: int, stop: int | None = None) -> None:
    """Keep some pictures of a transport stream that FFmpeg wrote, by their places in the file."""
    content = path.read_bytes()
    packets = [content[at : at + TS_PACKET] for at in range(0, len(content), TS_PACKET)]
    # Those in which a picture starts: a flag beside the number of the stream, which is 256 for the first one.
    starts = [at for at, packet in enumerate(packets) if (packet[1] & 0x5F, packet[2]) == (0x41, 0)]
    path.write_bytes(b"".join(packets[starts[first] : starts[stop] if stop else None]))


def _number(content: bytearray, at: int) -> int:
    return int(struct.unpack_from(">I", content, at)[0])


def _boxes(content: bytearray, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, start and stop of what each box holds."""
    while start + 8 <= stop:
        size = _number(content, start)
        yield content[start + 4 : start + 8].decode("latin-1"), start + 8, start + size
        start += size


def _find(content: bytearray, *names: str | tuple[str, int]) -> tuple[int, int] | None:
    """Return start and stop of what a box within boxes holds; of several of a name, the one of a number."""
    start, stop = 0, len(content)
    for name in names:
        wanted, number = (name, 0) if isinstance(name, str) else name
        found = [(a, b) for box, a, b in _boxes(content, start, stop) if box == wanted]
        if len(found) <= number:
            return None
        start, stop = found[number]
    return start, stop


def _box(content: bytearray, *names: str | tuple[str, int]) -> tuple[int, int]:
    found = _find(content, *names)
    assert found is not None, names
    return found


def _resize(content: bytearray, more: int, track: int) -> None:
    """Write the sizes that the boxes around a change will have: to be called before it."""
    for start, _ in (_box(content, "moov"), _box(content, "moov", ("trak", track))):
        struct.pack_into(">I", content, start - 8, _number(content, start - 8) + more)
