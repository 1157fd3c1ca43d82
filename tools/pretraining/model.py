"""What is trained: the image tower that is kept, a text tower and attribute heads that are thrown away.

B pictures, M captions, W words, C image channels, E embedding width.
"""

import json
import math
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.pretraining.pictures import LONGEST_CAPTION, VOCABULARY

CONFIG = "evl-tiny.json"
_TEXT_WIDTH, _TEXT_LAYERS = 128, 2

# Presence of each value or pair of values: (name, number of labels).
PRESENCE_HEADS = {
    "shape": 8,
    "colour": 8,
    "texture": 4,
    "size": 3,
    "cell": 9,
    "shape x colour": 64,
    "shape x texture": 32,
    "shape x cell": 72,
    "colour x cell": 72,
}
GROUND_HEADS = {"ground colour": 6, "ground pattern": 5}
PATCH_HEADS = {"shape": 8, "colour": 8, "texture": 4, "size": 3}  # of the thing that lies over a patch


def build_image_tower() -> nn.Module:
    """open_clip's VisionTransformer of evl-tiny's configuration, weights scaled by fan-in."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    config = json.loads((files("evl_cache") / "data" / CONFIG).read_text(encoding="utf-8"))
    visual: Any = _build_vision_tower(
        config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]), config["quick_gelu"]
    )
    layers = len(visual.transformer.resblocks)
    with torch.no_grad():
        visual.positional_embedding.mul_(4.0)  # or the tower takes long to learn that place matters
        for name, weight in visual.transformer.named_parameters():
            if weight.ndim != 2:
                continue
            residual = name.endswith(("out_proj.weight", "c_proj.weight"))
            std = weight.shape[1] ** -0.5 / ((2 * layers) ** 0.5 if residual else 1.0)
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
    return visual


class TextTower(nn.Module):
    """A small Transformer over words; the mean of its outputs is a caption's embedding."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.words = nn.Embedding(len(VOCABULARY), _TEXT_WIDTH, padding_idx=0)
        self.places = nn.Parameter(0.5 * torch.randn(LONGEST_CAPTION, _TEXT_WIDTH))
        layer = nn.TransformerEncoderLayer(
            _TEXT_WIDTH, 4, 4 * _TEXT_WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, _TEXT_LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(_TEXT_WIDTH)
        self.projection = nn.Linear(_TEXT_WIDTH, embed_dim, bias=False)

    def forward(self, captions: torch.Tensor) -> torch.Tensor:
        """int64 (M, W) -> (M, E)."""
        blank = captions == 0
        x = self.layers(self.words(captions) + self.places, src_key_padding_mask=blank)
        x = self.norm(x).masked_fill(blank[..., None], 0.0).sum(1) / (~blank).sum(1, keepdim=True)
        return self.projection(x)


class Pretraining(nn.Module):
    """Both towers, the attribute heads and the temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = build_image_tower()
        visual: Any = self.visual
        self.text = TextTower(int(visual.proj.shape[1]))
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        width = int(visual.proj.shape[0])
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, labels) for name, labels in (PRESENCE_HEADS | GROUND_HEADS).items()}
        )
        for name, labels in PRESENCE_HEADS.items():  # one thing at first: as likely as not is far too often
            nn.init.constant_(self.heads[name].bias, -math.log(labels))
        self.patch_heads = nn.ModuleDict(
            {name: nn.Linear(width, labels) for name, labels in PATCH_HEADS.items()}
        )

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float (B, 3, side, side), normalised -> class token (B, C) and patch tokens (B, P, C) after the last norm."""
        visual: Any = self.visual
        # 37 tokens are too few for the blocked kernel to pay: the plain products take a tenth off a step.
        with sdpa_kernel(SDPBackend.MATH):
            pooled, patches = visual._pool(visual.transformer(visual._embeds(pixels)))
        return pooled, patches

    def embed(self, pooled: torch.Tensor) -> torch.Tensor:
        """Class tokens (B, C) -> unit embeddings (B, E)."""
        visual: Any = self.visual
        return F.normalize((pooled @ visual.proj).float(), dim=-1)

    def embed_texts(self, captions: torch.Tensor) -> torch.Tensor:
        """int64 (M, W) -> unit embeddings (M, E)."""
        return F.normalize(self.text(captions).float(), dim=-1)


def contrastive_loss(logits: torch.Tensor, own: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Symmetric cross entropy in which nothing true counts as a wrong answer.

    Args:
        logits: (M, B). own: int64 (M,), the picture that each caption was written for.
        true: bool (M, B), whether it is true of each picture.
    """
    captions = torch.arange(len(own))
    is_own = torch.zeros_like(true)
    is_own[captions, own] = True
    others = logits.masked_fill(true & ~is_own, float("-inf"))
    of_texts = F.cross_entropy(others, own)
    # A picture against all captions that are false of it, once for each of its own.
    false = logits.masked_fill(true, float("-inf")).logsumexp(0)  # (B,)
    mine = logits[captions, own]
    of_images = (torch.logaddexp(mine, false[own]) - mine).mean()
    return 0.5 * (of_texts + of_images)
