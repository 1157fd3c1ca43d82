"""Any set of options ends in a result, or in one line with exit status 2; no file holds a number that is none.

A seed that fails is run alone by `pytest tests/cli/test_fuzz.py -m "" -k "[SEED]"`; its message has the command line.
"""

import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from evl_cache.extract import ExtractOptions, ExtractRequest, extract_dataset
from evl_cache.spec import ViewSpec
from evl_cache.store import FeatureCache
from evl_cache.sweep import sweep
from evl_cache.sweep.grid import expand
from evl_cache.train import TrainOptions, train
from tests.support import fuzz
from tests.support.feature_caches import TOWER, write_cache, write_pair
from tests.support.store_helpers import make_clips

SEEDS, OFTEN = 300, 36
LAYERS = (1, 2, 3, 4)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches, runs, videos and lists of clips under the names that command lines are drawn of."""
    folder = tmp_path_factory.mktemp("fuzz")
    caches = write_pair(folder, val_prefix="c", layers=LAYERS)
    write_cache(
        folder / "views", layers=LAYERS, views=ViewSpec(frames=3, stride=2, train_views=3), failed=(1,)
    )
    write_cache(folder / "no-maps", layers=LAYERS, maps="none", prefix="v", split="val", labels=(0, 1, 2))
    write_cache(folder / "few", layers=LAYERS, labels=(0, 1), failed=(0,))
    write_cache(folder / "all-failed", layers=LAYERS, labels=(0, 1), failed=(0, 1))
    write_cache(folder / "two-classes", layers=LAYERS, labels=(0, 1), classes=2)
    write_cache(folder / "other-tower", layers=LAYERS, tower=replace(TOWER, weights_sha256="34" * 32))
    options = TrainOptions(head="decoder1", epochs=2, batch=8)
    train(*caches, options=options, out=folder / "good")
    train(*caches, options=replace(options, head="linear"), out=folder / "linear")
    (folder / "unfinished").mkdir()
    shutil.copy(folder / "good" / "config.json", folder / "unfinished")
    sweep(*caches, runs=expand([{"head": ["linear", "mlap"], "epochs": [1]}], {}), out=folder / "sweep")
    _write_clips(folder)
    _train_on_videos(folder)
    return folder


def _write_clips(folder: Path) -> None:
    texts = {
        "half": "\n".join(f"c{i}" for i in range(4)),
        "first": "c1\ndir/c1.mp4\n",
        "rest": "\n".join(f"c{i}" for i in range(4, 13)),
        "unknown": "c0\nc99\n",
        "empty": "\n",
        "zeros": "a\0b\n",
        "repeated": "c1\nc1\ndir/c1.mp4\n",
    }

    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)


def _train_on_videos(folder: Path) -> None:
    """Leave `videos`, of which one is broken, `tower.json` and `live`, a run on them."""
    clips = make_clips(folder / "videos", 3, broken=False)
    (folder / "videos" / "tower.json").rename(folder / "tower.json")
    listed = folder / "listed.txt"
    listed.write_text("".join(f"{clip.path} {clips.classes[clip.label]}\n" for clip in clips.clips))
    request = ExtractRequest(
        dataset="list",
        list_path=listed,
        root=folder / "videos",
        model=str(folder / "tower.json"),
        pretrained="none",
        views=ViewSpec(frames=3, stride=2),
        cache=folder / "filmed",
    )
    for _ in extract_dataset(request, options=ExtractOptions(decode_workers=1)):
        pass
    (folder / "videos" / "broken.mp4").write_bytes((folder / "videos" / "00.mp4").read_bytes()[:200])
    cache = FeatureCache(folder / "filmed")
    options = TrainOptions(head="linear", epochs=1, batch=4)
    train(cache, cache, options=options, out=folder / "live", train_clips=[0, 1], val_clips=[2])


@pytest.fixture
def place(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the names of the world, which a command may write into, and a run of its own to resume."""
    for name in os.listdir(world):
        (tmp_path / name).symlink_to(world / name)
    shutil.copytree(world / "good", tmp_path / "resumed")
    for name in [name for name in os.environ if name.startswith("EVL_CACHE_")]:
        if not name.startswith("EVL_CACHE_TESTS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("EVL_CACHE_ROOT", str(tmp_path / "caches"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "seed", [*range(OFTEN), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(OFTEN, SEEDS))]
)
def test_a_set_of_options_ends_in_a_result_or_in_one_line(place: Path, seed: int) -> None:
    words = fuzz.arguments(seed)
    check(words, place)
    if words[0] == "train" and (place / "out").exists():
        check([*words, "--resume"], place)


PAIR = "--cache train --val-cache val --out out"
FAULTS = [  # that were found by hand or by the seeds
    f"train {PAIR} --head linear --steps 1 --lr 1e30",
    f"train {PAIR} --head linear --epochs 2 --lr 1e30",
    f"train {PAIR} --head linear --steps 1 --grad-clip nan",
    f"train {PAIR} --head linear --steps 1 --weight-decay inf",
    f"train {PAIR} --head linear --steps 1 --seed -1",
    f"train {PAIR} --head linear --steps 1 --device meta",
    f"train {PAIR} --head linear --steps 1 --cache-in-ram inf",
    f"train {PAIR} --head linear --steps 1 --val-clips .",
    f"sweep {PAIR} --head linear --steps 1 --lr 1e30,1e-3",
    f"sweep {PAIR} --head linear --steps 1 --grad-clip inf",
    f"sweep {PAIR} --head linear --steps 1 --memory nan",
    "predict videos --run live --csv .",
    "predict videos --run live --csv absent/labels.csv",
    "show c0 --cache train --out .",
    "show c0 --cache train --out absent/clip.png",
    "sweep --cache all-failed --val-cache val --head linear --steps 1 --out out",
]


@pytest.mark.parametrize("line", FAULTS)
def test_what_was_a_fault_is_none(place: Path, line: str) -> None:
    check(shlex.split(line), place)


def check(words: list[str], place: Path) -> None:
    ended = fuzz.run(words)
    own = [path for path in place.iterdir() if not path.is_symlink()]
    found = fuzz.faults(words, ended, own)
    assert found == [], f"evl-cache {shlex.join(words)}\n{ended.err}"


def test_the_fuzz_finds_what_it_looks_for(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"top1": NaN}')
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n{"a": 1, "a": 2}\n')
    (tmp_path / "c.csv").write_text("name,score\nnan-clip,nan\n")
    (tmp_path / "d.html").write_text("<td>nan</td><p>banana</p>")
    ended = fuzz.Ended(status=1, out="", err="error: something\n")
    found = fuzz.faults(["train"], ended, [tmp_path])
    assert [line.split(": ")[0] for line in found] == ["exit 1", "a.json", "b.jsonl", "c.csv", "d.html"]
    assert fuzz.faults(["train"], fuzz.Ended(status=2, out="", err="error: x\n"), []) == []
    assert fuzz.faults(["train"], fuzz.Ended(status=2, out="", err="x\n"), []) != []
    assert fuzz.faults(["train"], fuzz.Ended(status=None, out="", err="KeyError: 'x'\n"), []) != []
