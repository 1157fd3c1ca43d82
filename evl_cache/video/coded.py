"""What size and first byte of a coded packet tell of its picture, in codecs that need no parser for it."""

# In DivX and Xvid files a packet of a few bytes holds no picture; in other codecs even the smallest packet does.
NEVER_CODED = ("mpeg4", "msmpeg4", "h263", "flv")
LEAST_PICTURE_NBYTES = 8


def is_key(codec: str, packet: bytes) -> bool:
    """Return whether a packet's picture needs no other, as far as its first byte tells (RFC 6386, 9.1; VP9, 6.2)."""
    if codec == "vp8":
        return not packet[0] & 1
    if codec == "vp9":
        is_profile_3 = packet[0] & 0x30 == 0x30
        return not packet[0] & (
            6 if is_profile_3 else 0xC
        )  # it is shown for the first time, and is a key frame
    return True
