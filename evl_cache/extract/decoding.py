"""Which decoder gives the pixels that features were made of."""

from dataclasses import replace

from evl_cache.errors import UsageError
from evl_cache.video import DecodeOptions


def decoding_for(pixels: str, options: DecodeOptions, *, device: str) -> DecodeOptions:
    """Return the options with the decoder of these pixels, where they leave the decoder open.

    Args:
        pixels: as a cache's spec names them.
        options: as a user gave them.
        device: where torchcodec would decode.

    Raises: UsageError for a decoder of other pixels, or one that is not installed.
    """
    if pixels != options.pixels and options.decoder == "auto":  # only torchcodec has its own
        options = replace(options, decoder="torchcodec", device=device)
    if pixels != options.pixels:
        raise UsageError(
            f"the features are of {pixels} pixels, --decoder {options.decoder} on {options.device} gives {options.pixels}; "
            "use the decoder and the kind of device that they were made with"
        )
    return options
