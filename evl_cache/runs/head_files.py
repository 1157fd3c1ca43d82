"""The weights of trained heads: safetensors files that belong to a run's configuration."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from evl_cache.errors import WeightsError
from evl_cache.heads import Head
from evl_cache.runs.directory import RunFile, read_run_config
from evl_cache.runs.whole_files import whole_file
from evl_cache.untrusted.head_files import safetensors_shapes


def load_head(run: str | Path, *, best: bool = False) -> Head:
    """Return the trained head of a run directory, the last one or that of its best epoch, in eval mode on the CPU.

    Raises: UsageError where there is no run; WeightsError where its weights do not belong to it.
    """
    run = Path(run)
    path = run / (RunFile.BEST if best else RunFile.HEAD)
    config, shapes = read_run_config(run), safetensors_shapes(path)
    # The file is as large as its tensors, but the configuration may say anything.
    own = {name: tuple(value.shape) for name, value in config.sketch().state_dict().items()}
    wrong = sorted(name for name in own.keys() | shapes.keys() if own.get(name) != shapes.get(name))
    if wrong:
        raise WeightsError(f"{path}: does not belong to this head ({wrong[:3]} missing, extra or misshapen)")
    head = config.build()
    head.load_state_dict(load_file(path))
    return head.eval()


def save_head(run: Path, head: Head, *, best: bool = False) -> None:
    """Write `head.safetensors`, or `best.safetensors`, whole or not at all."""
    name = RunFile.BEST if best else RunFile.HEAD
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    with whole_file(run / name) as staging:
        save_file(tensors, staging)
