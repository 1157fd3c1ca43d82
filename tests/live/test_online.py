"""The control: training with the backbone live on videos equals training from a cache of the same views."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from evl_cache.errors import UsageError
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.request import ExtractRequest, dataset_reader, extract_dataset
from evl_cache.live.train import train_online
from evl_cache.runs import read_json_lines
from evl_cache.runs.directory import read_run_config
from evl_cache.runs.evaluate import evaluate
from evl_cache.spec import ViewSpec
from evl_cache.store import FeatureCache
from evl_cache.train.stage import TrainOptions, train
from evl_cache_cli.main import cli
from tests.support.store_helpers import make_clips

OPTIONS = TrainOptions(head="decoder2", epochs=3, batch=3, lr=2e-3, dropout=0.2)
HELD_OUT = ["02.mp4", "05.mp4"]
VIEWS = {
    "centre": ViewSpec(frames=4, stride=2),
    "several": ViewSpec(frames=3, sampling="tsn", stride=None, temporal_views=2, spatial_views=3),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of rendered clips, a list of them, and a small tower."""
    folder = tmp_path_factory.mktemp("videos")
    clips = make_clips(folder, 8, broken=False)
    names = [f"{clip.path} {clips.classes[clip.label]}" for clip in clips.clips]
    (folder / "list.txt").write_text("\n".join(names) + "\n")
    return folder


def request(folder, views):
    return ExtractRequest(
        dataset="list",
        list_path=folder / "list.txt",
        root=folder,
        model=str(folder / "tower.json"),
        pretrained="none",
        views=views,
        tokens="fp16",
        maps="fp16",
    )


def extracted(folder, views, cache):
    asked = replace(request(folder, views), layers=(2, 3), cache=cache)
    for _ in extract_dataset(asked, options=ExtractOptions(batch=4, decode_workers=1)):
        pass
    return FeatureCache(cache)


def online(folder, views, out, **more):
    losses = []
    result = train_online(
        request(folder, views),
        options=more.pop("options", OPTIONS),
        out=out,
        val_names=HELD_OUT,
        on_step=lambda done, total, loss: losses.append(loss),
        **more,
    )
    return result, losses


def test_augmented_online_equals_a_cache_of_as_many_views(videos, tmp_path, monkeypatch):
    for number, clip in enumerate(sorted(videos.glob("0*.mp4"))):
        folder = tmp_path / "clips" / ("val" if number % 4 == 0 else "train") / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, folder)
    views = VIEWS["centre"]
    asked = replace(
        request(videos, views),
        dataset="folder",
        list_path=None,
        root=tmp_path / "clips",
        train_split_views=replace(views, train_views=2, augment_seed=3),
    )
    monkeypatch.setenv("EVL_CACHE_ROOT", str(tmp_path / "caches"))
    done = extract_dataset(
        replace(asked, layers=(2, 3)),
        options=ExtractOptions(batch=4, decode_workers=1),
    )
    caches = {job.spec.split: FeatureCache(job.cache_path) for job, _ in done}
    losses = {"cached": [], "live": []}
    cached = train(
        caches["train"],
        caches["val"],
        options=OPTIONS,
        out=tmp_path / "cached",
        on_step=lambda done, total, loss: losses["cached"].append(loss),
    )
    live = train_online(
        asked,
        options=OPTIONS,
        out=tmp_path / "live",
        on_step=lambda done, total, loss: losses["live"].append(loss),
    )
    assert len(losses["live"]) == 3 * 2  # six clips in batches of three: one view of each in an epoch
    np.testing.assert_allclose(losses["live"], losses["cached"], atol=2e-3)
    assert live.top1 == cached.top1


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
def test_training_online_equals_training_from_a_cache(videos, tmp_path, views):
    cache = extracted(videos, views, tmp_path / "cache")
    rows = [i for i, clip in enumerate(cache.clips) if clip.id in HELD_OUT]
    losses = []
    cached = train(
        cache,
        cache,
        options=OPTIONS,
        out=tmp_path / "cached",
        train_clips=[i for i in range(8) if i not in rows],
        val_clips=rows,
        on_step=lambda done, total, loss: losses.append(loss),
    )
    live, live_losses = online(videos, views, tmp_path / "live")
    assert len(live_losses) == len(losses) == 3 * -(-6 * views.per_clip // 3)
    np.testing.assert_allclose(live_losses, losses, atol=2e-3)  # of features in float16
    assert (live.top1, live.val_clips, live.steps) == (cached.top1, 2, cached.steps)
    assert live.cache_fingerprint.startswith("online-") and live.skipped_clips == 0
    # what was trained live can be scored on a cache, and the other way round it is the same run but for its place
    assert evaluate(tmp_path / "live", cache, clips=rows).top1 == live.top1
    a, b = (read_run_config(tmp_path / name) for name in ("live", "cached"))
    assert (a.layers, a.head_config, a.classes, a.training) == (
        b.layers,
        b.head_config,
        b.classes,
        b.training,
    )


def test_a_killed_online_run_resumes_to_the_same_losses(videos, tmp_path):
    _, whole = online(videos, VIEWS["centre"], tmp_path / "whole")
    options = replace(OPTIONS, save_every_steps=1)

    class Killed(Exception):
        pass

    def die(done, total, loss):
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        train_online(
            request(videos, VIEWS["centre"]),
            options=options,
            out=tmp_path / "cut",
            val_names=HELD_OUT,
            on_step=die,
        )
    _, rest = online(videos, VIEWS["centre"], tmp_path / "cut", options=options, resume=True)
    assert rest == whole[3:]


def test_a_clip_that_cannot_be_decoded_is_skipped_and_counted(videos, tmp_path):
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    for name in ("03.mp4", "05.mp4"):  # one to train on, one to validate on
        (folder / name).write_bytes((folder / name).read_bytes()[:150])
    failed = []
    result, losses = online(
        folder,
        VIEWS["centre"],
        tmp_path / "run",
        on_failure=lambda clip, reason: failed.append((clip, reason)),
    )
    assert [clip for clip, _ in failed] == ["03.mp4", "05.mp4"] and all(reason for _, reason in failed)
    assert result.skipped_clips == 2 and result.val_clips == 1
    assert len(losses) == 6 and np.isfinite(losses).all()


def test_a_batch_whose_clips_all_fail_trains_no_epoch_more(videos, tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(videos, folder)
    (folder / "03.mp4").write_bytes(b"no video")
    options = replace(OPTIONS, epochs=2, batch=1)
    result, losses = online(folder, VIEWS["centre"], tmp_path / "run", options=options)
    assert (result.epochs, result.steps, len(losses)) == (2, 2 * 5, 2 * 5)  # of six clips one fails
    assert result.skipped_clips == 1
    again, more = online(folder, VIEWS["centre"], tmp_path / "run", options=options, resume=True)
    assert (again.epochs, again.steps, more) == (2, 2 * 5, [])


def test_nothing_to_train_on_is_an_error_and_no_endless_run(videos, tmp_path):
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    for name in {p.name for p in folder.glob("*.mp4")} - set(HELD_OUT):
        (folder / name).write_bytes(b"no video")
    with pytest.raises(Exception, match="none of the clips to train on can be used"):
        online(folder, VIEWS["centre"], tmp_path / "run")


def test_what_needs_a_cache_is_refused_online(videos, tmp_path):
    for wrong in ({"batch": "auto"}, {"keep_in": "ram"}):
        with pytest.raises(UsageError, match="--online has no cache"):
            online(videos, VIEWS["centre"], tmp_path / "run", options=replace(OPTIONS, **wrong))
    with pytest.raises(UsageError, match="expected train and val, or one list with --val-clips"):
        train_online(request(videos, VIEWS["centre"]), options=OPTIONS, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_trains_online_and_refuses_its_options_without(videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("held.txt").write_text("\n".join(HELD_OUT))
    place = ["--dataset", "list", "--list", str(videos / "list.txt"), "--root", str(videos)]
    tower = ["--model", str(videos / "tower.json"), "--pretrained", "none", "--frames", "4", "--stride", "2"]
    rest = ["--head", "decoder1", "--steps", "2", "--batch", "4", "--val-clips", "held.txt", "--out", "run"]
    done = CliRunner().invoke(cli, ["train", "--online", *place, *tower, *rest], standalone_mode=False)
    assert done.return_value == 0 and "run: top-1" in done.stdout, done
    assert "mostly taken for" in done.stdout or "100.00 %" in done.stdout
    assert Path("run/head.safetensors").is_file()
    args = ["train", "--cache", "x", "--val-cache", "y", "--frames", "4"]
    refused = CliRunner().invoke(cli, args, standalone_mode=False)
    assert isinstance(refused.exception, UsageError) and "--frames is for --online" in str(refused.exception)


def test_videos_whose_classes_are_in_another_order_are_scored_by_names_to_the_bit(
    videos, tmp_path, monkeypatch
):
    for place, path in enumerate(sorted(videos.glob("*.mp4"))):
        target = tmp_path / "d" / ("train", "val")[place % 2] / "abc"[place // 2 % 3] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    asked = replace(request(videos, VIEWS["centre"]), dataset="folder", list_path=None, root=tmp_path / "d")
    options = replace(OPTIONS, head="linear", epochs=2)

    folder = dataset_reader("folder")

    def of_other_order(root, **more):
        lists = folder.reader(root, **more)
        val = lists["val"]
        clips = tuple(replace(clip, label=2 - clip.label) for clip in val.clips)
        return {**lists, "val": replace(val, clips=clips, classes=val.classes[::-1])}

    train_online(asked, options=options, out=tmp_path / "same")
    other = replace(folder, reader=of_other_order)
    monkeypatch.setattr("evl_cache.extract.request.dataset_reader", lambda name: other)
    train_online(asked, options=options, out=tmp_path / "other")
    assert read_run_config(tmp_path / "other").classes == ("a", "b", "c")
    assert (
        read_run_config(tmp_path / "other").caches["val"] != read_run_config(tmp_path / "same").caches["val"]
    )
    for name in ("head.safetensors", "confusion.csv", "scored.csv", "classes.json"):
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "same" / name).read_bytes(), name
    losses = [
        [row["val_loss"] for row in read_json_lines(tmp_path / out / "metrics.jsonl")]
        for out in ("same", "other")
    ]
    assert losses[0] == losses[1]
