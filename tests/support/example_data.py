"""Data under the names that examples in help, README and docs use, and an environment for commands on them."""

import json
import os
import shutil
from pathlib import Path

import pytest

from evl_cache.rendered import DEMO_CLASSES, demo_motion_frames, write_video

ROOT = Path(__file__).resolve().parents[2]
DEMO_TOWER = ROOT / "evl_cache" / "data" / "demo-tower.json"
OFFICIAL = Path(__file__).parents[1] / "fixtures" / "evl_reference" / "official_layout_checkpoint.pth"
DEEP_TOWER = {
    "embed_dim": 8,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 16,
        "width": 32,
        "layers": 12,
        "head_width": 16,
        "mlp_ratio": 1.0,
    },
}


def render(path: Path, class_name: str, index: int, split: str = "train") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, demo_motion_frames(class_name, index, split=split, size=64))


def make_data(folder: Path) -> None:
    """Class folders `clips`, a list `clips.txt` of `videos`, a Kinetics tree in `sets`, towers, a checkpoint."""
    for split in ("train", "val"):
        for i, name in enumerate(("left", "right", "up", "down", "approach", "recede")):
            render(folder / "clips" / split / name / f"a {i}.mp4", name, i, split)
    lines = []
    for i in range(10):
        render(folder / "videos" / f"clip {i}.mp4", DEMO_CLASSES[i % 5], i)
        lines.append(f"clip {i}.mp4 {DEMO_CLASSES[i % 5]}")
    (folder / "clips.txt").write_text("\n".join(lines) + "\n")
    for name in ("held-out.txt", "fold1.txt"):
        (folder / name).write_text("clip 3.mp4\nclip 6.mp4\nclip 7.mp4\n")
    (folder / "grid.toml").write_text('epochs = 2\n\n[[grid]]\nhead = ["decoder1", "linear"]\n')
    kinetics = folder / "sets" / "k400"
    (kinetics / "annotations").mkdir(parents=True)
    for split, count in (("train", 3), ("val", 2)):
        rows = ["label,youtube_id,time_start,time_end,split"]
        for i in range(count):
            rows.append(f"{DEMO_CLASSES[i]},{split}{i:06d},{i},{i + 10},{split}")
            render(kinetics / split / f"{split}{i:06d}_{i:06d}_{i + 10:06d}.mp4", DEMO_CLASSES[i], i, split)
        (kinetics / "annotations" / f"{split}.csv").write_text("\n".join(rows) + "\n")
    (folder / "deep-tower.json").write_text(json.dumps(DEEP_TOWER))
    shutil.copy(OFFICIAL, folder / "k400_vitb16_8f_dec4x768.pth")


def settle(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.chdir(folder)
    for name in [name for name in os.environ if name.startswith("EVL_CACHE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EVL_DATA_ROOT", str(folder / "sets"))
    monkeypatch.setenv("EVL_CACHE_EXTRACT_MODEL", str(DEMO_TOWER))
    monkeypatch.setenv("EVL_CACHE_EXTRACT_PRETRAINED", "none")
    monkeypatch.setenv("EVL_CACHE_ESTIMATE_MODEL", str(DEMO_TOWER))
    monkeypatch.setenv("EVL_CACHE_ESTIMATE_PRETRAINED", "none")
