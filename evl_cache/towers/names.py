"""Names of towers and weights that mean something special, and the weights of a model for which none are named."""

TINY_TOWER, TINY_PRETRAINED = "evl-tiny", "rendered-v1"  # what comes with the package
TIMM_PREFIX, TIMM_DEFAULT = "timm/", "default"  # models by timm's names, and the first weights of each


def default_pretrained(model: str) -> str:
    """The weights of a model for which none are named."""
    if model.startswith(TIMM_PREFIX):
        return TIMM_DEFAULT
    return TINY_PRETRAINED if model == TINY_TOWER else "openai"
