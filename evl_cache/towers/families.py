"""The families of towers, and which of them a tower belongs to."""

from torch import nn

from evl_cache.errors import UsageError
from evl_cache.towers.adapter import TowerAdapter


def adapter_of(visual: nn.Module) -> TowerAdapter:
    """Return the adapter of a tower.

    Raises: UsageError for a tower whose layers have no tokens, queries and keys that EVL can read.
    """
    from evl_cache.towers.open_clip_vit import OpenClipVit
    from evl_cache.towers.timm_vit import TimmVit, timm_trunk

    if hasattr(getattr(visual, "transformer", None), "resblocks") and hasattr(visual, "_embeds"):
        return OpenClipVit(visual)
    trunk = timm_trunk(visual)
    if trunk is None:
        raise UsageError(
            f"the image tower is a {type(visual).__name__}; expected an open_clip VisionTransformer (ViT-…) or a "
            "VisionTransformer or Eva of timm (SigLIP, EVA-02, PE-Core, DINO): other towers have no layers of tokens "
            "that EVL can read"
        )
    return TimmVit(trunk)
