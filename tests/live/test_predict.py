"""Raw videos to labels: the same scores as from a cache, with nothing asked that the run knows."""

import csv
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from evl_cache.batches.feature_loader import FeatureLoader
from evl_cache.errors import UsageError, WeightsError
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.request import ExtractRequest, extract_dataset
from evl_cache.live.predict import find_videos, predict
from evl_cache.live.train import train_online
from evl_cache.runs.directory import read_run_config, write_run_config
from evl_cache.runs.evaluate import evaluate
from evl_cache.runs.head_files import load_head, save_head
from evl_cache.runs.import_head import import_head
from evl_cache.runs.scoring import score
from evl_cache.spec import ViewSpec
from evl_cache.store import FeatureCache
from evl_cache.train.stage import TrainOptions, train
from evl_cache_cli.main import cli
from tests.conftest import ROOT
from tests.support.store_helpers import make_clips

VIEWS = ViewSpec(frames=3, sampling="tsn", stride=None, temporal_views=2, spatial_views=3)
NUM_CLASSES = 6  # of the six clips
OPTIONS = TrainOptions(head="decoder2", epochs=2, batch=4, lr=2e-3)
OFFICIAL = ROOT / "tests" / "fixtures" / "evl_reference" / "official_layout_checkpoint.pth"

pytestmark = pytest.mark.usefixtures("one_thread")


def extracted(folder, cache, **changes):
    asked = ExtractRequest(
        dataset="list",
        list_path=folder / "list.txt",
        root=folder,
        model=str(folder / "tower.json"),
        pretrained="none",
        layers=(2, 3),
        cache=cache,
        **{"views": VIEWS, "tokens": "fp16", "maps": "fp16", **changes},
    )
    for _ in extract_dataset(asked, options=ExtractOptions(batch=4, decode_workers=1)):
        pass
    return FeatureCache(cache)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Clips, their cache, and a run on it."""
    folder = tmp_path_factory.mktemp("predict")
    clips = make_clips(folder / "videos", 6, broken=False)
    names = [f"{clip.path} {clips.classes[clip.label]}" for clip in clips.clips]
    (folder / "videos" / "list.txt").write_text("\n".join(names) + "\n")
    cache = extracted(folder / "videos", folder / "cache")
    train(cache, cache, options=OPTIONS, out=folder / "run", val_clips=[0, 1])
    return folder


def from_cache(run, cache):
    """Probabilities of every clip, in the order of the list."""
    layers = read_run_config(run).layers
    loader = FeatureLoader(cache, np.arange(len(cache)), layers=layers, batch=4)
    return score(load_head(run), loader, device=torch.device("cpu")).probabilities


@pytest.mark.parametrize("name", ["linear", "mlap"])
def test_heads_beyond_evl_predict_what_eval_scores(work, tmp_path, name):
    cache = FeatureCache(work / "cache")
    train(cache, cache, options=replace(OPTIONS, head=name), out=tmp_path / "run", val_clips=[0, 1])
    found = predict(tmp_path / "run", [work / "videos"])
    # Live features are whole frames' tokens: a linear head takes the class token of each.
    order = np.argsort([str(video) for video in found.videos])
    expected = from_cache(tmp_path / "run", cache)
    np.testing.assert_allclose(found.probabilities[order], expected, atol=2e-3)


def test_predictions_equal_the_scores_from_a_cache(work):
    found = predict(work / "run", [work / "videos"])
    assert [video.name for video in found.videos] == [f"{i:02d}.mp4" for i in range(6)]
    assert found.failures == () and found.classes == FeatureCache(work / "cache").spec.classes
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-9)
    expected = from_cache(work / "run", FeatureCache(work / "cache"))
    np.testing.assert_allclose(found.probabilities, expected, atol=5e-4)  # of features in float16
    assert np.ptp(expected, axis=0).max() > 1e-2  # clips do differ


def test_a_head_is_computed_in_its_trainings_precision_unless_told(work, tmp_path):
    cache, one = FeatureCache(work / "cache"), [work / "videos" / "03.mp4"]
    train(
        cache, cache, options=replace(OPTIONS, precision="bfloat16"), out=tmp_path / "run", val_clips=[0, 1]
    )
    as_trained, exact = (predict(tmp_path / "run", one, precision=name) for name in (None, "float32"))
    assert (as_trained.precision, exact.precision) == ("bfloat16", "float32")
    difference = np.abs(as_trained.probabilities - exact.probabilities).max()
    assert 0 < difference < 0.02
    report = json.loads(invoke(*one, "--run", tmp_path / "run", "--precision", "float32", "--json").stdout)
    assert report["precision"] == "float32"
    assert report["videos"][0]["labels"][0]["score"] == exact.probabilities.max()
    with pytest.raises(UsageError, match="tf32 on cpu"):
        predict(tmp_path / "run", one, precision="tf32")


def test_a_run_is_whole_without_its_cache_its_list_and_its_towers_file(work, tmp_path):
    here = shutil.copytree(work, tmp_path / "here")
    extracted(here / "videos", here / "cache2")
    train(FeatureCache(here / "cache2"), FeatureCache(here / "cache2"), options=OPTIONS, out=here / "run2")
    before = predict(here / "run2", [here / "videos" / "03.mp4"]).probabilities
    shutil.rmtree(here / "cache2")
    (here / "videos" / "tower.json").unlink()
    (here / "videos" / "list.txt").unlink()
    assert np.array_equal(predict(here / "run2", [here / "videos" / "03.mp4"]).probabilities, before)


def test_a_run_is_validated_and_asked_with_the_views_of_its_validation_cache(work, tmp_path):
    one = extracted(
        work / "videos", tmp_path / "one", views=replace(VIEWS, temporal_views=1, spatial_views=1)
    )
    train(one, FeatureCache(work / "cache"), options=OPTIONS, out=tmp_path / "run")
    found = predict(tmp_path / "run", [work / "videos"])
    expected = from_cache(tmp_path / "run", FeatureCache(work / "cache"))
    np.testing.assert_allclose(found.probabilities, expected, atol=5e-4)


def test_a_run_trained_online_predicts(work, tmp_path):
    asked = ExtractRequest(
        dataset="list",
        list_path=work / "videos" / "list.txt",
        root=work / "videos",
        model=str(work / "videos" / "tower.json"),
        pretrained="none",
        views=replace(VIEWS, temporal_views=1, spatial_views=1),
    )
    train_online(asked, options=OPTIONS, out=tmp_path / "run", val_names=["00.mp4"])
    assert predict(tmp_path / "run", [work / "videos" / "00.mp4"]).probabilities.shape == (
        1,
        NUM_CLASSES,
    )


def test_another_tower_is_refused_and_a_moved_one_can_be_named(work, tmp_path):
    other = json.loads((work / "videos" / "tower.json").read_text())
    other["vision_cfg"]["layers"] = 4
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(WeightsError, match="the run was trained on features of tower"):
        predict(work / "run", [work / "videos"], model=str(tmp_path / "other.json"))
    moved = shutil.copy(work / "videos" / "tower.json", tmp_path / "moved.json")
    one = [work / "videos" / "01.mp4"]
    named = predict(work / "run", one, model=str(moved), pretrained="none").probabilities
    assert np.array_equal(named, predict(work / "run", one).probabilities)


def test_an_imported_head_has_no_tower(tmp_path, work):
    import_head(OFFICIAL, tmp_path / "run")
    with pytest.raises(UsageError, match="its head was imported"):
        predict(tmp_path / "run", [work / "videos"])


def test_what_is_no_video_is_named(work, tmp_path):
    with pytest.raises(UsageError, match=r"nothing\.mp4: no such file"):
        find_videos([tmp_path / "nothing.mp4"])
    with pytest.raises(UsageError, match="no video in it"):
        find_videos([tmp_path])
    first = work / "videos" / "00.mp4"
    assert find_videos([first, work / "videos", first]) == [
        work / "videos" / f"{i:02d}.mp4" for i in range(6)
    ]


def invoke(*args):
    return CliRunner().invoke(cli, ["predict", *map(str, args)], standalone_mode=False)


def test_a_broken_video_is_told_and_the_others_are_labelled(work, tmp_path):
    good, broken = work / "videos" / "02.mp4", tmp_path / "broken.mp4"
    broken.write_bytes(good.read_bytes()[:200])
    answer = invoke(good, broken, "--run", work / "run", "--topk", 2, "--json")
    assert answer.return_value == 3 and f"failed: {broken}" in answer.stderr
    report = json.loads(answer.stdout)
    assert [video["video"] for video in report["videos"]] == [str(good)]
    assert [failure["video"] for failure in report["failures"]] == [str(broken)]
    scores = [label["score"] for label in report["videos"][0]["labels"]]
    assert len(scores) == 2 and scores == sorted(scores, reverse=True)
    only = invoke(broken, "--run", work / "run")
    assert only.return_value == 3 and only.stdout == ""


def test_labels_as_text_and_csv(work, tmp_path):
    video = work / "videos" / "02.mp4"
    ranked = predict(work / "run", [video]).top(3)[0]
    text = invoke(video, "--run", work / "run", "--topk", 3)
    assert text.return_value == 0
    assert text.stdout.splitlines() == [
        str(video),
        *(f"  {100 * score:6.2f} %  {name}" for name, score in ranked),
    ]
    invoke(video, "--run", work / "run", "--topk", 3, "--csv", tmp_path / "labels.csv")
    printed = invoke(video, "--run", work / "run", "--topk", 3, "--csv", "-").stdout
    written = (tmp_path / "labels.csv").read_text()
    for content in (written, printed):
        rows = list(csv.DictReader(io.StringIO(content)))
        assert [(row["video"], row["rank"], row["label"]) for row in rows] == [
            (str(video), str(rank), name) for rank, (name, _) in enumerate(ranked, 1)
        ]
    assert invoke(video, "--run", work / "run", "--topk", 99).stdout.count("%") == NUM_CLASSES


def test_predict_equals_eval_within_quantisation_on_real_clips(ut_interaction, work, tmp_path):
    files = sorted(ut_interaction.rglob("*.avi"))[::20]
    lines = [f"{file.relative_to(ut_interaction)} {i % 3}" for i, file in enumerate(files)]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    asked = ExtractRequest(
        dataset="list",
        list_path=tmp_path / "list.txt",
        root=ut_interaction,
        model=str(work / "videos" / "tower.json"),
        pretrained="none",
        layers=(2, 3),
        views=ViewSpec(frames=4, stride=8, temporal_views=2, spatial_views=3),
        cache=tmp_path / "cache",
    )
    for _ in extract_dataset(asked, options=ExtractOptions()):
        pass
    cache = FeatureCache(tmp_path / "cache")
    train(cache, cache, options=OPTIONS, out=tmp_path / "run")
    found = predict(tmp_path / "run", files)
    expected = from_cache(tmp_path / "run", cache)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-2)
    assert np.array_equal(found.probabilities.argmax(1), expected.argmax(1))


def test_labels_are_those_of_names_in_whatever_order_a_heads_classes_are(work, tmp_path):
    """The classifier's rows and the names in another order, and a cache of that order: the same labels and scores."""
    run = shutil.copytree(work / "run", tmp_path / "other")
    config, head = read_run_config(run), load_head(run)
    order = list(reversed(range(len(config.classes))))
    with torch.no_grad():
        head.classifier.weight.copy_(head.classifier.weight[order].clone())
        head.classifier.bias.copy_(head.classifier.bias[order].clone())
    names = tuple(config.classes[row] for row in order)
    write_run_config(
        run, replace(config, classes=names, features={**config.features, "classes": list(names)})
    )
    save_head(run, head)
    one, other = (predict(place, [work / "videos"]) for place in (work / "run", run))
    assert other.classes == names and one.classes == config.classes
    # Rows of a product are summed in the order that they lie in.
    np.testing.assert_allclose(one.probabilities[:, order], other.probabilities, atol=1e-6)
    assert [[name for name, _ in row] for row in one.top(3)] == [
        [name for name, _ in row] for row in other.top(3)
    ]
    # A cache has an order of its own, too, which changes no score.
    cache = FeatureCache(work / "cache")
    np.testing.assert_allclose(one.probabilities, from_cache(work / "run", cache), atol=5e-4)
    assert evaluate(work / "run", cache).top1 == evaluate(run, cache).top1
