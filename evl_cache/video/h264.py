"""What H.264 packets and their parameter sets say of the pictures, without decoding them (ITU-T H.264, 7.3 and annex D).

Whatever cannot be read is answered with the careful word: not progressive, no IDR picture, changes its pictures.
"""

from collections.abc import Iterator

_SLICE, _IDR_SLICE, _SEI, _SPS = 1, 5, 6, 7  # types of units; 2 is a slice in three parts, the first of them
_FIRST_SLICES = (_SLICE, 2, _IDR_SLICE)
_RECOVERY_POINT = 6  # a type of SEI
_DISPLAY_ORIENTATION = 47
_HARMFUL_MESSAGES = frozenset((1, _DISPLAY_ORIENTATION))  # 1 is picture timing
_PROFILES_WITH_CHROMA_FORMAT = (100, 110, 122, 244, 44, 83, 86, 118, 128, 134, 135, 138, 139)
_MOST_SPS_BYTES = 4096  # twelve scaling lists of the longest codes, and more
_START_CODE = b"\x00\x00\x01"


class _Unreadable(ValueError):
    """Bytes are not what the standard says."""


def is_progressive(extradata: bytes | None) -> bool:
    """Whether all sequence parameter sets of a stream's extradata allow whole pictures only: no fields, no MBAFF."""
    try:
        sets = list(_sps_units(extradata or b""))
        return bool(sets) and all(_frame_mbs_only(unit) for unit in sets)
    except _Unreadable:
        return False


def has_idr(packet: bytes, extradata: bytes | None) -> bool:
    """Whether a packet's picture is an IDR picture, before which no later picture looks back.

    Of two fields only the first need be one, thus the first slice tells.
    """
    try:
        for unit in _units(packet, extradata or b""):
            if unit[0] & 31 in _FIRST_SLICES:
                return unit[0] & 31 == _IDR_SLICE
    except _Unreadable:
        pass
    return False


def has_slice(packet: bytes, extradata: bytes | None) -> bool:
    """Whether a packet holds part of a picture, or cannot be read."""
    try:
        return any(unit[0] & 31 in _FIRST_SLICES for unit in _units(packet, extradata or b""))
    except _Unreadable:
        return True


def begins_anew(packet: bytes, extradata: bytes | None) -> bool:
    """Whether no picture that is shown after a packet's needs one from before it: an IDR picture, or a recovery point."""
    if has_idr(packet, extradata):
        return True
    try:
        for unit in _units(packet, extradata or b""):
            if unit[0] & 31 == _SEI:
                # Its first number, how many frames it takes to recover, is 0 where the first bit is set.
                found = _messages(bytes(unit)).get(_RECOVERY_POINT, b"")
                if found[:1] >= b"\x80":
                    return True
    except _Unreadable:
        pass
    return False


def changes_pictures(packet: bytes, extradata: bytes | None) -> bool:
    """Whether a packet says that pictures from it on are turned, or may be interlaced.

    Decoders hear of a turn only if they pass this packet, and decord does not heed it. Picture timing can mark even
    whole pictures as interlaced.
    """
    try:
        for unit in _units(packet, extradata or b""):
            kind = unit[0] & 31
            if kind == _SPS and not _frame_mbs_only(bytes(unit)):
                return True
            if kind == _SEI and not _HARMFUL_MESSAGES.isdisjoint(_messages(bytes(unit))):
                return True
    except _Unreadable:
        return True
    return False


def turns_pictures(packet: bytes, extradata: bytes | None) -> bool:
    """Whether a packet may say that pictures from it on are turned or mirrored."""
    try:
        return any(
            unit[0] & 31 == _SEI and _DISPLAY_ORIENTATION in _messages(bytes(unit))
            for unit in _units(packet, extradata or b"")
        )
    except _Unreadable:
        return True


def _units(packet: bytes, extradata: bytes) -> Iterator[memoryview]:
    """Yield a packet's units, none empty. Raises: _Unreadable where lengths do not fit."""
    if extradata[:1] != b"\x01":
        yield from _units_by_start_codes(packet)
        return
    if len(extradata) < 7:
        raise _Unreadable
    length_size = (extradata[4] & 3) + 1
    at, data = 0, memoryview(packet)
    while at < len(data):
        start = at + length_size
        end = start + int.from_bytes(data[at:start], "big")
        if end > len(data) or start > len(data):
            raise _Unreadable
        if end > start:
            yield data[start:end]
        at = end


def _units_by_start_codes(packet: bytes) -> Iterator[memoryview]:
    data = memoryview(packet)
    at = packet.find(_START_CODE)
    if at < 0 and packet:
        raise _Unreadable
    while at >= 0:
        start = at + len(_START_CODE)
        at = packet.find(_START_CODE, start)
        unit = data[start : at if at >= 0 else len(data)]
        if unit:
            yield unit


def _sps_units(extradata: bytes) -> Iterator[bytes]:
    """Yield the sequence parameter sets of an avcC record, or of units after start codes."""
    if extradata[:1] != b"\x01":
        yield from (bytes(u) for u in _units_by_start_codes(extradata) if u[0] & 31 == _SPS)
        return
    if len(extradata) < 7:
        raise _Unreadable
    at = 6
    for _ in range(extradata[5] & 31):
        size = int.from_bytes(extradata[at : at + 2], "big")
        unit = extradata[at + 2 : at + 2 + size]
        if len(unit) < size or not unit or unit[0] & 31 != _SPS:
            raise _Unreadable
        yield unit
        at += 2 + size


def _payload(unit: bytes) -> bytes:
    """Return a unit's bytes behind its header, without those that keep start codes from arising."""
    return unit[1:].replace(b"\x00\x00\x03", b"\x00\x00")


def _messages(unit: bytes) -> dict[int, bytes]:
    """Return an SEI unit's messages by type. Raises: _Unreadable where sizes do not fit."""
    data, at = _payload(unit), 0
    found: dict[int, bytes] = {}
    while at < len(data) and data[at:].rstrip(b"\x00") != b"\x80":  # what ends a unit
        numbers = []
        for _ in ("type", "size"):
            number = 0
            while at < len(data) and data[at] == 255:
                number, at = number + 255, at + 1
            if at >= len(data):
                raise _Unreadable
            numbers.append(number + data[at])
            at += 1
        kind, size = numbers
        if at + size > len(data):
            raise _Unreadable
        found[kind] = data[at : at + size]
        at += size
    return found


class _Bits:
    """Reads bits in order. Raises: _Unreadable at the end, and for codes of more than 32 bits."""

    def __init__(self, data: bytes) -> None:
        self._bits = "".join(f"{byte:08b}" for byte in data[:_MOST_SPS_BYTES])
        self._at = 0

    def number(self, width: int) -> int:
        """Return an unsigned number of `width` bits."""
        bits = self._bits[self._at : self._at + width]
        if len(bits) < width:
            raise _Unreadable
        self._at += width
        return int(bits, 2)

    def unsigned(self) -> int:
        """Return an unsigned number in Exp-Golomb code."""
        zeros = self._bits.find("1", self._at) - self._at
        if not 0 <= zeros <= 32:
            raise _Unreadable
        self._at += zeros
        return self.number(zeros + 1) - 1

    def signed(self) -> int:
        """Return a signed number in Exp-Golomb code."""
        code = self.unsigned()
        return (code + 1) // 2 if code % 2 else -(code // 2)


def _frame_mbs_only(unit: bytes) -> bool:
    """Return the flag of a sequence parameter set (7.3.2.1.1). Raises: _Unreadable where it is none."""
    bits = _Bits(_payload(unit))
    profile = bits.number(8)
    bits.number(16)  # constraints, level
    bits.unsigned()  # its id
    if profile in _PROFILES_WITH_CHROMA_FORMAT:
        chroma_format = bits.unsigned()
        if chroma_format > 3:
            raise _Unreadable
        if chroma_format == 3:
            bits.number(1)  # separate colour planes
        bits.unsigned()  # depths of luma and chroma
        bits.unsigned()
        bits.number(1)  # lossless transform bypass
        if bits.number(1):
            for number in range(8 if chroma_format != 3 else 12):
                if bits.number(1):
                    _pass_scaling_list(bits, 16 if number < 6 else 64)
    bits.unsigned()  # length of frame numbers
    _pass_picture_order(bits)
    bits.unsigned()  # reference frames
    bits.number(1)  # gaps
    bits.unsigned()  # width and height
    bits.unsigned()
    return bool(bits.number(1))


def _pass_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.signed()) % 256
        last = following or last


def _pass_picture_order(bits: _Bits) -> None:
    kind = bits.unsigned()
    if kind == 0:
        bits.unsigned()
    elif kind == 1:
        bits.number(1)
        bits.signed()
        bits.signed()
        cycle = bits.unsigned()
        if cycle > 255:
            raise _Unreadable
        for _ in range(cycle):
            bits.signed()
    elif kind != 2:
        raise _Unreadable
