"""How many processes decode, how many threads compress, and how many samples a pass has, where nobody says.

B samples of a batch, T frames, S the tower's image size, N tokens of a frame, C channels.
"""

import math
from dataclasses import dataclass

import torch

from evl_cache.extract.job import ExtractOptions
from evl_cache.extract_options import (
    CPU_BATCH,
    CPU_DECODE_WORKERS,
    MOST_DECODE_WORKERS,
    MOST_DEFAULT_BATCH,
)
from evl_cache.processes import MEMORY_SHARE, available_bytes, local_processes, processor_share
from evl_cache.spec import CacheSpec
from evl_cache.video import DecodeOptions

# Of a process that decodes. Measured: 130 MB of its own on 1920 x 1080 pixels, 36 MB on 320 x 240. Another 64 MB of the
# clip's frames are held beside it until they are cropped.
WORKER_NBYTES = 256 << 20
DEVICE_DECODERS = 2  # processes that decode on the GPU: each has a context there, some hundred MB
LEAST_COMPRESSING = 2
BATCH_TOKENS = 32 * 8 * 257  # of a pass on a GPU: of 32 samples of 8 frames by ViT-L/14
DEVICE_SHARE = 3  # a pass may take one part in so many of the device's memory


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What works beside the device.

    Attributes:
        decoding: processes that decode.
        compressing: threads that compress rows.
    """

    decoding: int
    compressing: int


def default_workers(
    device: str,
    *,
    processors: int,
    memory_nbytes: int,
    clip_nbytes: int = 0,
    decodes_on_device: bool = False,
) -> Workers:
    """Return what keeps a device busy: all processors beside a GPU; few on a CPU, which needs them for the forward pass.

    Args:
        device: where the tower runs.
        processors: of this process alone.
        memory_nbytes: that the decoding processes and what they made may take.
        clip_nbytes: size of a prepared clip, of which each decoding process has one in hand.
        decodes_on_device: whether videos are decoded on the GPU.
    """
    few = min(CPU_DECODE_WORKERS, max(1, processors))
    if torch.device(device).type == "cpu":
        return Workers(decoding=few, compressing=few)
    most = DEVICE_DECODERS if decodes_on_device else MOST_DECODE_WORKERS
    fitting = memory_nbytes // (WORKER_NBYTES + clip_nbytes)
    return Workers(
        decoding=max(1, min(processors, most, fitting)),
        compressing=max(LEAST_COMPRESSING, processors // 2),
    )


def default_workers_on(device: str, spec: CacheSpec, decoding: DecodeOptions) -> Workers:
    """Return the default of this process: of its share of the computer's processors and free memory."""
    memory = MEMORY_SHARE * available_bytes(torch.device("cpu")) / local_processes()
    return default_workers(
        device,
        processors=processor_share(),
        memory_nbytes=int(memory),
        clip_nbytes=frames_nbytes(spec, spec.views.per_clip),
        decodes_on_device=decoding.decoder == "torchcodec" and torch.device(decoding.device).type != "cpu",
    )


def workers_for(options: ExtractOptions, spec: CacheSpec) -> Workers:
    """Return the processes and threads of an extraction: those that the options name, the others by the default."""
    usual = default_workers_on(options.device, spec, options.decoding)
    decoding = options.decode_workers or usual.decoding
    # On a CPU whoever names the processes names the threads, too: more of both take cores from the forward pass.
    compressing = decoding if torch.device(options.device).type == "cpu" else usual.compressing
    return Workers(decoding=decoding, compressing=options.compress_threads or compressing)


def default_batch(device: str, spec: CacheSpec, total_nbytes: int) -> int:
    """Return the samples of a pass on a device: on a GPU a power of two, of about `BATCH_TOKENS` tokens, that fits.

    It follows from the device's memory and not from what of it is free, so that equal cards make equal bytes.

    Args:
        total_nbytes: memory of the device; any on a CPU.
    """
    if torch.device(device).type == "cpu":
        return CPU_BATCH
    tokens = spec.views.frames * spec.num_tokens  # of a sample
    batch = 1
    while 2 * batch * tokens <= BATCH_TOKENS and 2 * batch <= MOST_DEFAULT_BATCH:
        batch *= 2
    while batch > 1 and pass_nbytes(spec, batch) > total_nbytes // DEVICE_SHARE:
        batch //= 2
    return batch


def default_batch_on(device: torch.device, spec: CacheSpec) -> int:
    """Return the default of a device that is there."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return default_batch(device.type, spec, total)


def batch_for(options: ExtractOptions, spec: CacheSpec) -> int:
    """Return the samples of one forward pass: those that the options name, else those that suit device and tower.

    A pass never crosses a block, so that more samples than a block has would be padding. By default passes on a GPU share
    out a block evenly, so that there is next to none.
    """
    block = spec.block_samples
    if options.batch is not None:
        return min(options.batch, block)
    batch = min(default_batch_on(torch.device(options.device), spec), block)
    if torch.device(options.device).type == "cpu":
        return batch
    passes = math.ceil(block / batch)
    return math.ceil(block / passes)


def frames_nbytes(spec: CacheSpec, samples: int) -> int:
    """Return the bytes of samples before the forward pass, float32 (samples, T, 3, S, S)."""
    return samples * spec.views.frames * 3 * spec.tower.image_size**2 * torch.float32.itemsize


def pass_nbytes(spec: CacheSpec, batch: int) -> int:
    """Return about what a forward pass takes of the device, its weights apart.

    With e bytes of a value in the tower's dtype and V = B T N C values in a layer's tokens, these are: e V (2 + 3 + 1 +
    2 x 4) for the residual stream and its norm, queries, keys and values, what attention returns, and the MLP's hidden
    values before and after their activation; e V for each stored layer and e B (2 (T-1) P P) for its maps, twice, as
    the rows of one batch are made while the next one runs; 3 x 4 V for quantising a layer in float32; and the frames in
    float32, twice, and once in the tower's dtype.
    """
    itemsize: int = getattr(torch, spec.compute_dtype).itemsize
    frames, patches = spec.views.frames, spec.num_tokens - 1
    values = batch * frames * spec.num_tokens * spec.tower.width
    maps = batch * 2 * (frames - 1) * patches**2 * len(spec.layers) if spec.stores_maps else 0
    running = itemsize * values * (2 + 3 + 1 + 2 * 4)
    stored = 2 * itemsize * (values * len(spec.stored_layers) + maps)
    quantising = 3 * torch.float32.itemsize * values
    pixels = frames_nbytes(spec, batch)
    return running + stored + quantising + 2 * pixels + pixels * itemsize // torch.float32.itemsize
