"""The names of towers and weights that have a meaning here, and each model's default weights."""

from pathlib import Path

TINY_TOWER, TINY_PRETRAINED = "evl-tiny", "rendered-v1"  # the tower that comes with the package
TIMM_PREFIX, TIMM_DEFAULT = "timm/", "default"  # `timm/NAME` is a model of timm, `default` its first weights


def default_pretrained(model: str) -> str:
    """Return the weights that a model gets where none are named."""
    if model.startswith(TIMM_PREFIX):
        return TIMM_DEFAULT
    return TINY_PRETRAINED if model == TINY_TOWER else "openai"


def is_model_file(model: str) -> bool:
    """Whether a model's name is a JSON file's."""
    return model.endswith(".json") and not model.startswith(TIMM_PREFIX)


def is_weights_file(pretrained: str) -> bool:
    """Whether what is named as weights is a file; `none` never is, nor is what timm's `default` stands for."""
    return pretrained not in ("none", TIMM_DEFAULT) and Path(pretrained).is_file()
