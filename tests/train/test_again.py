"""A run records all that is needed to do it again, and `train --again` does."""

import importlib.metadata
import json
import re
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

import numpy
import pytest
import torch
from click.testing import CliRunner

import evl_cache
from evl_cache.errors import EvlCacheError, UsageError
from evl_cache.notation import format_rows, parse_rows
from evl_cache.runs.directory import read_run_config
from evl_cache.runs.intervals import wilson_interval
from evl_cache.store import FeatureCache, public_text
from evl_cache.sweep import sweep
from evl_cache.sweep.grid import expand
from evl_cache.train.stage import TrainOptions, train
from evl_cache_cli.main import cli
from tests.support.credentials import PASSWORD, USER
from tests.support.feature_caches import write_cache, write_pair
from tests.support.servers import faulty_server

OPTIONS = TrainOptions(
    head="decoder2", epochs=2, batch=4, lr=3e-3, seed=5, weight_decay=0.1, head_layers=(2, 4)
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("caches"), failed=(2,))


@pytest.fixture(scope="module")
def fold(caches, tmp_path_factory):
    """A run on some clips of both sides."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "fold"
    train(*caches, options=OPTIONS, out=out, train_clips=[0, 1, 2, 3, 4, 5, 8, 12], val_clips=[0, 3, 4])
    return out


def command(*words):
    done = CliRunner().invoke(cli, ["train", *map(str, words)], standalone_mode=False)
    if done.exception is not None and not isinstance(done.exception, EvlCacheError):
        raise done.exception
    return done


def again(run, out, *words):
    done = command("--again", run, "--out", out, *words)
    assert done.exception is None and done.return_value == 0, done.exception
    return done


def content(run):
    return json.loads((run / "config.json").read_text())


def head_and_losses(run):
    return (run / "head.safetensors").read_bytes(), (run / "steps.jsonl").read_text()


def test_a_run_records_versions_device_threads_precision_command_and_date(caches, tmp_path):
    before = datetime.now(UTC)
    given = (
        "--cache",
        caches[0].path,
        "--val-cache",
        caches[1].path,
        "--device",
        "cpu",
        "--head",
        "decoder2",
        "--epochs",
        1,
    )
    done = command(*given, "--out", tmp_path / "a run")
    assert done.return_value == 0
    found = content(tmp_path / "a run")["environment"]
    python = found["versions"].pop("python")
    assert re.fullmatch(r"3\.\d+\.\d+\S*", python)
    assert found["versions"] == {
        "evl-cache": evl_cache.__version__,
        "torch": importlib.metadata.version("torch"),
        "numpy": numpy.__version__,
    }
    assert found["device"].startswith("cpu ") and (found["threads"], found["processes"]) == (1, 1)
    assert found["precision"] == "float32"
    assert found["command"] == (
        f"evl-cache train --cache {caches[0].path} --val-cache {caches[1].path} --device cpu --head decoder2 --epochs 1 "
        f"--out '{tmp_path / 'a run'}'"
    )
    date = datetime.fromisoformat(found["date"])
    assert timedelta(seconds=-1) <= date - before < timedelta(minutes=5)


def test_a_continuation_with_other_threads_is_recorded_beside_the_start(caches, tmp_path):
    class Killed(Exception):
        pass

    def kill(done, total, loss):
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        train(*caches, options=OPTIONS, out=tmp_path / "run", on_step=kill)
    begun = content(tmp_path / "run")
    train(*caches, options=OPTIONS, out=tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == begun
    torch.set_num_threads(2)
    train(*caches, options=OPTIONS, out=tmp_path / "run", resume=True)
    torch.set_num_threads(1)
    found = content(tmp_path / "run")
    (resumed,) = found["environment"].pop("resumed")
    assert found == begun and (resumed["threads"], found["environment"]["threads"]) == (2, 1)


def test_runs_of_a_sweep_and_of_python_record_it_too(caches, tmp_path):
    runs = expand([{"head": ["linear", "meanpool"]}], {"epochs": 1, "batch": 8})
    sweep(*caches, runs=runs, out=tmp_path / "sweep", command="evl-cache sweep …")
    for run in runs:
        found = content(tmp_path / "sweep" / "runs" / run.name)["environment"]
        assert found["command"] == "evl-cache sweep …" and found["threads"] == 1
    train(*caches, options=replace(OPTIONS, epochs=1), out=tmp_path / "own")
    assert content(tmp_path / "own")["environment"]["command"] is None


def test_no_password_is_recorded(caches, tmp_path, monkeypatch):
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    with faulty_server(caches[0].path.parent, given=(PASSWORD,)) as server:
        place = server.url.replace("://", f"://{USER}:{PASSWORD}@")
        given = (
            f"--cache={place}/train",
            "--val-cache",
            f"{place}/val",
            "--device",
            "cpu",
            "--head",
            "decoder2",
            "--epochs",
            1,
        )
        assert command(*given, "--out", tmp_path / "run").return_value == 0
        files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        assert files and not any(PASSWORD.encode() in path.read_bytes() for path in files)
        found = content(tmp_path / "run")["environment"]["command"]
        assert f"--cache={server.url}/train --val-cache {server.url}/val " in found
        again(tmp_path / "run", tmp_path / "second")
    assert head_and_losses(tmp_path / "run") == head_and_losses(tmp_path / "second")


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("--lr", "--lr"),
        ("/data/a:b", "/data/a:b"),
        ("https://lab:pw@host:8080/a/b?sig=pw", "https://host:8080/a/b"),
        ("--cache=s3://key:pw@bucket/a", "--cache=s3://bucket/a"),
        ("https:/lab:pw@host/a", "https://host/a"),
        ("https://[lab:pw@host", "https://…"),
    ],
)
def test_words_of_a_command_are_shown_without_credentials(word, shown):
    assert public_text(word) == shown


def test_a_run_again_is_the_same_head_on_the_same_clips(caches, fold, tmp_path):
    done = again(fold, tmp_path / "run", "--json")
    assert head_and_losses(tmp_path / "run") == head_and_losses(fold)
    mine, theirs = content(tmp_path / "run"), content(fold)
    told = json.loads(done.stdout)
    assert told["is_same_head"] is True
    assert told["top1_interval"] == list(wilson_interval(told["top1"], told["val_clips"]))
    for config in (mine, theirs):
        config.pop("environment")
    assert mine == theirs
    assert (mine["caches"]["train"]["clips"], mine["caches"]["val"]["clips"]) == ("0-1,3-5,8,12", "0,3-4")


def test_all_clips_stay_all_and_a_chosen_batch_stays_a_number(caches, tmp_path):
    train(*caches, options=replace(OPTIONS, batch="auto", epochs=1), out=tmp_path / "all")
    found = content(tmp_path / "all")
    assert [found["caches"][side]["clips"] for side in ("train", "val")] == ["all", "all"]
    said = again(tmp_path / "all", tmp_path / "second").stderr
    assert "the same, bit for bit" in said
    assert head_and_losses(tmp_path / "all") == head_and_losses(tmp_path / "second")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("all", "second")]
    assert len({result["skipped_clips"] for result in results}) == 1


def test_a_list_of_clips_that_is_too_long_to_keep_is_asked_for(caches, fold, tmp_path, monkeypatch):
    monkeypatch.setattr("evl_cache.train.setup._MOST_CLIPS_NBYTES", 4)
    train(*caches, options=replace(OPTIONS, epochs=1), out=tmp_path / "run", train_clips=[0, 3, 5])
    assert [content(tmp_path / "run")["caches"][side]["clips"] for side in ("train", "val")] == [None, "all"]
    done = command("--again", tmp_path / "run", "--out", tmp_path / "out")
    assert "does not record its clips; name them with --train-clips" in str(done.exception)


def test_a_head_of_a_sweep_is_trained_again_alone(caches, tmp_path):
    runs = expand([{"head": ["linear"], "seed": [3, 4]}], {"epochs": 1, "batch": 8})
    sweep(*caches, runs=runs, out=tmp_path / "sweep", val_clips=[1, 2])
    member = tmp_path / "sweep" / "runs" / runs[1].name
    again(member, tmp_path / "alone")
    assert head_and_losses(member) == head_and_losses(tmp_path / "alone")


def test_options_given_win(fold, tmp_path):
    words = ("--lr", 1e-2, "--steps", 3, "--no-temporal-conv", "--seed", 6, "--cache-in-ram", 0.1)
    done = again(fold, tmp_path / "run", *words)
    changed = {"lr": 1e-2, "epochs": None, "steps": 3, "temporal_conv": False, "seed": 6}
    kept = {"keep_in": "ram", "keep_bytes": 10**8, "shuffle_blocks": 0}
    expected = json.loads(json.dumps(asdict(replace(OPTIONS, **changed, **kept))))
    assert content(tmp_path / "run")["training"] == expected
    assert "its head is" not in done.stderr
    again(fold, tmp_path / "linear", "--head", "linear")
    found = read_run_config(tmp_path / "linear")
    assert (found.head, found.layers, found.training["lr"]) == ("linear", (4,), OPTIONS.lr)


def test_other_caches_and_clips_win(caches, fold, tmp_path):
    other = write_cache(tmp_path / "other", seed=9)  # other features of the same clips
    again(fold, tmp_path / "run", "--cache", other.path)
    found = content(tmp_path / "run")["caches"]
    assert found["train"]["fingerprint"] == other.fingerprint
    assert found["train"]["clips"] == content(fold)["caches"]["train"]["clips"]
    assert found["val"] == content(fold)["caches"]["val"]
    (tmp_path / "names.txt").write_text("v1\nv3\n")
    again(fold, tmp_path / "named", "--val-clips", tmp_path / "names.txt")
    found = content(tmp_path / "named")["caches"]
    assert (found["train"]["clips"], found["val"]["clips"]) == ("all", "1,3")
    strangers = write_cache(tmp_path / "strangers", prefix="x")
    done = command("--again", fold, "--cache", strangers.path, "--out", tmp_path / "x")
    assert re.search(r"has other clips than .*fold had; name them with --train-clips", str(done.exception))


def test_what_is_not_as_it_was_is_told(fold, tmp_path):
    changed = content(fold)
    changed["environment"]["versions"]["torch"] = "2.8.0"
    changed["environment"]["threads"] = 4
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(changed))
    said = again(tmp_path / "old", tmp_path / "run").stderr
    versions = content(tmp_path / "run")["environment"]["versions"]
    assert (
        f"had torch 2.8.0, now {versions['torch']}; threads 4, now 1: losses may differ by rounding" in said
    )
    assert "its head is not that of" in said  # which has none


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({"features": None, "training": {"imported_from": "x.pth"}}, (), "its head was imported, not trained"),
        ({"training": {"head": "linear", "epochs": 1, "wings": 2}}, (), r"does not know \(wings\); use the version"),
        ({"training": {"head": "linear", "epochs": 1, "lr": "fast"}}, (), "its options are none that train has"),
        ({}, ("--recipe", "k400"), "--again and --recipe; expected one of them"),
        ({}, ("--dataset", "folder"), "--again and --dataset"),
        ({}, ("--online",), "--again and --online"),
        ({}, ("--epochs", "1", "--steps", "1"), "expected exactly one of them"),
        ({("caches", "train", "clips"): None}, (), r"does not record its clips; name them with --train-clips"),
        ({("caches", "train", "clips"): "0-99"}, (), r"its clips of train are not those of .* expected ascending"),
        ({("caches", "val", "path"): "/away"}, (), "its validation cache /away is not there; give --val-cache"),
        ({("caches", "val", "fingerprint"): "12" * 32}, (), r"is not what .* trained with any more .*--val-cache"),
        ({("caches", "train", "fingerprint"): "online-1"}, (), r"was trained from videos.*: evl-cache train --online"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_again_is_told_in_one_line(fold, tmp_path, change, words, message):
    config = content(fold)
    config["environment"]["command"] = "evl-cache train --online …"
    for name, value in change.items():
        *folders, last = name if isinstance(name, tuple) else (name,)
        place = config
        for folder in folders:
            place = place[folder]
        place[last] = value
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    done = command("--again", tmp_path / "run", "--out", tmp_path / "out", *words)
    assert isinstance(done.exception, EvlCacheError) and re.search(message, str(done.exception))
    assert "\n" not in str(done.exception) and not (tmp_path / "out").exists()


def test_a_run_is_not_done_again_over_itself(fold):
    before = head_and_losses(fold)
    done = command("--again", fold, "--out", fold)
    assert isinstance(done.exception, UsageError) and "another --out" in str(done.exception)
    assert head_and_losses(fold) == before


def test_a_run_of_an_earlier_version_is_read_and_done_again_with_its_clips_named(caches, fold, tmp_path):
    config = content(fold)
    del config["environment"]
    for side in ("train", "val"):
        for name in ("content_id", "clips"):
            del config["caches"][side][name]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert read_run_config(tmp_path / "run").environment is None
    names = {"train": [0, 1, 3, 4, 5, 8, 12], "val": [0, 3, 4]}
    for side, cache in zip(names, caches, strict=True):
        ids = [FeatureCache(cache.path).clips[row].id for row in names[side]]
        (tmp_path / f"{side}.txt").write_text("\n".join(ids))
    files = (f"--{side}-clips {tmp_path / side}.txt".split() for side in names)
    again(tmp_path / "run", tmp_path / "second", *(word for pair in files for word in pair))
    assert head_and_losses(fold) == head_and_losses(tmp_path / "second")


def test_rows_are_read_as_they_were_written():
    for rows in ([], [0], [3, 4, 5, 9], [0, 2, 4], list(range(100))):
        assert parse_rows(format_rows(reversed(rows)), below=100) == rows
    assert format_rows([5, 3, 4, 9, 3]) == "3-5,9"
    for text in ("1,1", "3-2", "2,1", "100", "-1", "a", "0-1000000000000"):
        with pytest.raises(ValueError, match=r"expected ascending|invalid literal"):
            parse_rows(text, below=100)
