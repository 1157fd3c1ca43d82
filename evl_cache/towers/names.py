"""The names of towers and weights that have a meaning here, and each model's default weights."""

TINY_TOWER, TINY_PRETRAINED = "evl-tiny", "rendered-v1"  # the tower that comes with the package
TIMM_PREFIX, TIMM_DEFAULT = "timm/", "default"  # `timm/NAME` is a model of timm, `default` its first weights


def default_pretrained(model: str) -> str:
    """Return the weights that a model gets where none are named."""
    if model.startswith(TIMM_PREFIX):
        return TIMM_DEFAULT
    return TINY_PRETRAINED if model == TINY_TOWER else "openai"
