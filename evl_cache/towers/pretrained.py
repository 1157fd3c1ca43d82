"""The weights of a tower: a file, a tag that is downloaded, or those that come with this package."""

import hashlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

from evl_cache.errors import WeightsError, WeightsUnavailable, first_line
from evl_cache.towers.names import TINY_PRETRAINED, TINY_TOWER, is_model_file, is_weights_file
from evl_cache.towers.weights import TowerWeights, read_tower_weights


def bundled(name: str) -> Path:
    """Return the path of a file of the package's data."""
    return Path(str(files("evl_cache") / "data" / name))


def find_weights(model: str, pretrained: str, config: dict[str, Any]) -> tuple[TowerWeights, dict[str, Any]]:
    """Return the weights of an open_clip model, and the mean and standard deviation that their tag names, if any.

    Raises: WeightsError for what is neither file nor tag, or was trained with the other activation;
        WeightsUnavailable where a tag's weights cannot be downloaded.
    """
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    quick_gelu = bool(config.get("quick_gelu", False))
    if is_weights_file(pretrained):
        weights = read_tower_weights(Path(pretrained))
        _check_activation(model, pretrained, needed=weights.is_openai_archive or None, has=quick_gelu)
        return weights, {}
    if model == TINY_TOWER:
        if pretrained != TINY_PRETRAINED:
            raise WeightsError(
                f"--pretrained {pretrained!r} is neither a file nor a tag of {TINY_TOWER}; expected "
                f"{TINY_PRETRAINED}, a file, or none"
            )
        return read_tower_weights(_intact(bundled(f"{TINY_TOWER}.safetensors"), config["weights_sha256"])), {}
    tag = get_pretrained_cfg(model, pretrained)
    if not tag:
        tags = list_pretrained_tags_by_model(model)
        raise WeightsError(
            f"--pretrained {pretrained!r} is neither a file nor a tag of {model}; "
            f"expected one of {', '.join(tags) or '(no tags)'}, a file, or none"
        )
    _check_activation(model, pretrained, needed=bool(tag.get("quick_gelu", False)), has=quick_gelu)
    return read_tower_weights(_download(model, pretrained, tag)), {
        name: tuple(tag[name]) for name in ("mean", "std") if tag.get(name) is not None
    }


def _intact(path: Path, sha256: str) -> Path:
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"
    if found != sha256:
        raise WeightsError(
            f"{path}: its sha256 is {found[:16]}, expected {sha256[:16]}; install evl-cache again, or give --pretrained FILE"
        )
    return path


def _check_activation(model: str, pretrained: str, *, needed: bool | None, has: bool) -> None:
    if needed is None or needed == has:
        return
    remedy = f"--model {model}-quickgelu" if needed else f"--model {model.removesuffix('-quickgelu')}"
    if is_model_file(model):
        remedy = f'"quick_gelu": {str(needed).lower()} in that file'
    raise WeightsError(
        f"QuickGELU mismatch: weights {pretrained!r} were trained {'with' if needed else 'without'} it, "
        f"model {model} is {'with' if has else 'without'}; use {remedy}"
    )


@contextmanager
def downloading(model: str, pretrained: str) -> Iterator[None]:
    """Let the hub's client download meanwhile; without a network it looks into its cache only.

    It would retry for a minute otherwise.

    Raises: WeightsUnavailable for any error meanwhile, with what to do.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    host = urlparse(constants.ENDPOINT).hostname
    if not getproxies():
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:  # the hub's client raises many kinds; all mean that the file is not here
        raise WeightsUnavailable(
            f"weights {pretrained!r} of {model} could not be downloaded ({first_line(error)[:160]}); no network? Fetch "
            "them where there is one and pass --pretrained FILE, share its hub cache (HF_HOME), or use --pretrained none"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _download(model: str, pretrained: str, tag: dict[str, Any]) -> Path:
    from open_clip.pretrained import download_pretrained

    with downloading(model, pretrained):
        return Path(download_pretrained(tag))
