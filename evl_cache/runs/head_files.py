"""The weights of trained heads: safetensors files that belong to a run's configuration."""

from pathlib import Path

from safetensors.torch import load_file, save

from evl_cache.errors import WeightsError
from evl_cache.heads import Head
from evl_cache.runs.directory import RunFile, read_run_config
from evl_cache.runs.finite import check_finite, not_finite
from evl_cache.runs.whole_files import whole_file
from evl_cache.untrusted.head_files import safetensors_shapes


def load_head(run: str | Path, *, best: bool = False) -> Head:
    """Return the trained head of a run directory, the last one or that of its best epoch, in eval mode on the CPU.

    Raises: UsageError where there is no run; WeightsError where its weights do not belong to it, or are NaN or infinite.
    """
    run = Path(run)
    path = run / (RunFile.BEST if best else RunFile.HEAD)
    config, shapes = read_run_config(run), safetensors_shapes(path)
    # The file is as large as its tensors, but the configuration may say anything.
    own = {name: tuple(value.shape) for name, value in config.sketch().state_dict().items()}
    wrong = sorted(name for name in own.keys() | shapes.keys() if own.get(name) != shapes.get(name))
    if wrong:
        raise WeightsError(f"{path}: does not belong to this head ({wrong[:3]} missing, extra or misshapen)")
    head, tensors = config.build(), load_file(path)
    if (found := not_finite(tensors)) is not None:
        raise WeightsError(
            f"{path}: {found} is NaN or infinite, as that run had diverged; train it anew with a lower --lr"
        )
    head.load_state_dict(tensors)
    return head.eval()


def save_head(run: Path, head: Head, *, best: bool = False) -> None:
    """Write `head.safetensors`, or `best.safetensors`, whole or not at all. Raises: NotFinite; what was there stays."""
    name = RunFile.BEST if best else RunFile.HEAD
    check_finite(head.state_dict(), run / name)
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    # Not by `save_file`: it stages the file under a name of its own, which a kill leaves, and closes it to the group.
    with whole_file(run / name) as staging:
        staging.write_bytes(save(tensors))
