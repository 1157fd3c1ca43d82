"""The rendered benchmarks: what decides a class and what does not, by seed, and read as any data set."""

import functools
import json
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from evl_cache import FeatureCache, demo
from evl_cache.errors import UsageError
from evl_cache.rendered import motions, scenes
from evl_cache.rendered.benchmarks import (
    BENCHMARKS,
    DIFFICULTIES,
    RenderOptions,
    begun_options,
    clip_frames,
    is_rendered,
    render,
)
from evl_cache.rendered.drawing import SHAPES
from evl_cache.rendered.films import PALETTES
from evl_cache.sampling import strided_test_views
from evl_cache_cli.demo import TOWERS
from evl_cache_cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
SMALL = RenderOptions(clips_per_class={"train": 2, "val": 1}, side=32, num_frames=6)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_frames_follow_from_seed_split_class_and_number(name: str) -> None:
    class_name = BENCHMARKS[name].classes[0]

    def draw(index: int = 0, split: str = "train", **options: object) -> np.ndarray:
        return clip_frames(name, class_name, index, split=split, options=RenderOptions(**options))

    assert draw().shape == (16, 96, 96, 3) and np.array_equal(draw(), draw())
    others = [draw(1), draw(split="val"), draw(seed=1), *(draw(difficulty=d) for d in ("easy", "hard"))]
    assert not any(np.array_equal(draw(), other) for other in others)


@pytest.mark.parametrize(("forward", "backward"), motions.REVERSED)
def test_two_classes_of_motions_hold_the_same_frames_in_opposite_order(forward: str, backward: str) -> None:
    for difficulty in DIFFICULTIES:
        options = RenderOptions(difficulty=difficulty, side=32)
        clip, twin = (
            clip_frames("motions", name, 3, split="val", options=options) for name in (forward, backward)
        )
        assert np.array_equal(clip, twin[::-1]) and not np.array_equal(clip, twin)


def test_each_shape_of_scenes_is_in_three_classes_and_no_clip_shows_another_classs_pair() -> None:
    assert Counter(shape for pair in scenes.PAIRS for shape in pair) == dict.fromkeys(SHAPES, 3)
    assert len(scenes.CLASSES) == len(scenes.PAIRS) == 12
    for class_name in scenes.CLASSES:
        for index in range(20):
            film = scenes.scene_film(
                class_name,
                np.random.default_rng(index),
                split="train",
                difficulty=scenes.DIFFICULTIES["hard"],
                num_frames=3,
            )
            shown = {thing.shape for thing in film.things[0]}
            pairs = ["_and_".join(pair) for pair in scenes.PAIRS if set(pair) <= shown]
            assert pairs == [class_name]
            assert film.things[0] == film.things[1] == film.things[2]  # nothing moves but the camera


def test_training_and_validation_share_no_colour_of_things_and_few_grounds() -> None:
    train, val = PALETTES["train"], PALETTES["val"]
    assert not set(train.colours) & set(val.colours)
    assert len(set(train.ground_colours) & set(val.ground_colours)) <= 1
    assert set(val.textures) - set(train.textures) and set(val.ground_patterns) - set(train.ground_patterns)


@pytest.mark.parametrize(("name", "across", "sign"), [("moving_right", True, 1), ("moving_up", False, -1)])
def test_harder_motions_travel_less_before_a_camera_that_pans_more(
    name: str, across: bool, sign: int
) -> None:
    travelled, panned = {}, {}
    for difficulty in DIFFICULTIES:
        films = [
            motions.motion_film(
                name,
                np.random.default_rng(index),
                split="train",
                difficulty=motions.DIFFICULTIES[difficulty],
                num_frames=16,
            )
            for index in range(30)
        ]
        paths = [
            [sign * (film.things[t][-1].x if across else film.things[t][-1].y) for t in (0, 15)]
            for film in films
        ]
        travelled[difficulty] = np.mean([end - start for start, end in paths])
        panned[difficulty] = np.mean([np.hypot(*np.subtract(film.pans[-1], film.pans[0])) for film in films])
    assert travelled["easy"] > travelled["normal"] > travelled["hard"] > 0.2
    assert 0 == panned["easy"] < panned["normal"] < panned["hard"]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_displacement_between_sampled_frames_is_as_documented(difficulty: str) -> None:
    frames = strided_test_views(16, frames=8, stride=2, views=1)[0]
    steps = []
    for index in range(100):
        film = motions.motion_film(
            "moving_right",
            np.random.default_rng(index),
            split="val",
            difficulty=motions.DIFFICULTIES[difficulty],
            num_frames=16,
        )
        steps += list(np.diff([96 * film.things[frame][-1].x for frame in frames]))
    low, high = (96 * 14 / 15 / 7 * travel for travel in motions.DIFFICULTIES[difficulty].travel)
    assert low <= min(steps) < low + 0.1 * (high - low) and high - 0.1 * (high - low) < max(steps) <= high
    page = (ROOT / "docs" / "rendered-benchmarks.md").read_text(encoding="utf-8")
    assert f"{low:.1f}-{high:.1f} pixels" in page and f"{low / 16:.2f}-{high / 16:.2f}" in page


def test_a_stopped_rendering_goes_on_and_other_options_are_refused(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise Stop

    with pytest.raises(Stop):
        render("scenes", tmp_path / "stopped", options=SMALL, on_clip=stop)
    assert not is_rendered(tmp_path / "stopped") and begun_options(tmp_path / "stopped") == SMALL
    with pytest.raises(UsageError, match="seed differ"):
        render("scenes", tmp_path / "stopped", options=RenderOptions(**{**vars(SMALL), "seed": 1}))
    for folder in ("stopped", "whole"):
        render("scenes", tmp_path / folder, options=SMALL)
    assert is_rendered(tmp_path / "stopped")
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.*"))
    assert len(files) == 12 * 3 + 1
    assert all(
        (tmp_path / "whole" / f).read_bytes() == (tmp_path / "stopped" / f).read_bytes() for f in files
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        render("scenes", tmp_path / "other", options=SMALL)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_extract_draws_what_is_not_there_and_reads_it_as_any_data_set(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVL_DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.setenv("EVL_CACHE_ROOT", str(tmp_path / "caches"))
    monkeypatch.setattr("evl_cache.datasets.rendered_clips.begun_options", lambda root: SMALL)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    run("extract", "--dataset", name, "--model", "evl-tiny", "--layers", "7-8", "--frames", "2")
    caches = sorted((tmp_path / "caches").iterdir())
    assert [cache.name.rsplit("-", 1)[0] for cache in caches] == [f"{name}-train", f"{name}-val"]
    spec = json.loads(run("info", str(caches[0]), "--json"))["spec"]
    assert spec["views"]["stride"] == 2 and tuple(spec["classes"]) == BENCHMARKS[name].classes
    out = str(tmp_path / "run")
    run("train", "--dataset", name, "--head", "decoder2", "--epochs", "1", "--device", "cpu", "--out", out)
    video = tmp_path / "data" / name / "val" / BENCHMARKS[name].classes[0] / "0000.mp4"
    (found,) = json.loads(run("predict", str(video), "--run", out, "--json"))["videos"]
    assert found["labels"][0]["label"] in BENCHMARKS[name].classes


def test_impossible_renderings_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'gentle'"):
        RenderOptions(difficulty="gentle")
    with pytest.raises(UsageError, match="side 33"):
        RenderOptions(side=33)
    with pytest.raises(UsageError, match="expected at least 1 of train and val"):
        RenderOptions(clips_per_class={"train": 0})
    with pytest.raises(UsageError, match="'dances'"):
        render("dances", tmp_path, options=SMALL)
    with pytest.raises(UsageError, match="'jumping' of motions"):
        clip_frames("motions", "jumping", 0, split="train", options=SMALL)


def test_the_demo_trains_with_and_without_modules_on_evl_tiny_too(tmp_path: Path) -> None:
    """With its own tower `make demo` runs it."""
    options = replace(
        demo.demo_options("evl-tiny", device="cpu"), clips_per_class={"train": 1, "val": 1}, epochs=1, batch=8
    )
    quiet = nullcontext((lambda failed: None, lambda name: None))
    result = demo.run_demo(tmp_path, options=options, progress=lambda spec: quiet)
    assert result.classes == 8 and result.with_modules.val_clips == result.without_modules.val_clips == 8
    assert result.with_modules.parameters > result.without_modules.parameters
    spec = FeatureCache(tmp_path / "caches" / "train").spec
    assert (spec.tower.pretrained, spec.layers) == ("rendered-v1", (3, 4, 5))


def test_the_demo_offers_the_towers_that_there_are() -> None:
    assert tuple(demo.TOWERS) == TOWERS


def at_once(*calls: Callable[[], object]) -> list[str]:
    """Call functions at the same time in threads. Returns: the errors."""
    together = threading.Barrier(len(calls))
    errors: list[str] = []

    def run(call: Callable[[], object]) -> None:
        together.wait()
        try:
            call()
        except UsageError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=run, args=[call]) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_two_that_render_into_one_folder_write_the_same_clips(tmp_path: Path) -> None:
    assert not at_once(*[lambda: render("scenes", tmp_path / "two", options=SMALL)] * 2)
    render("scenes", tmp_path / "one", options=SMALL)
    one, two = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert one == two


def test_of_two_with_other_options_one_gets_the_folder(tmp_path: Path) -> None:
    options = [SMALL, RenderOptions(**{**vars(SMALL), "seed": 1})]
    calls = [functools.partial(render, "scenes", tmp_path / "root", options=each) for each in options]
    (error,) = at_once(*calls)
    assert "holds clips of other options (seed differ)" in error
