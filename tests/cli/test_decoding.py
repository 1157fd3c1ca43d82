"""Every command decodes in processes: a clip on which a decoder aborts or hangs costs only itself, and bounded time."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from evl_cache.errors import ClipError, UsageError, WorkerError
from evl_cache.spec import CacheSpec
from evl_cache.store import FeatureCache
from evl_cache.train.stage import train
from evl_cache.video import process as decode_process
from evl_cache_cli.main import cli
from tests.live.test_predict import OPTIONS, extracted
from tests.support.example_data import ROOT
from tests.support.store_helpers import make_clips

pytestmark = pytest.mark.usefixtures("one_thread")
BAD = ("aborts.mp4", "hangs.mp4")  # by every decoder
SERVED = ("fine 1.mp4",)
NAMES = (
    "http:x.mp4", "2023-10-01T12:30:05.mp4", "file:y.mp4", "concat:a|b.mp4", "pipe:0.mp4", "-.mp4", "%05d.mp4",
    "new\nline.mp4", "esc\x1b[31m.mp4", "quo'te\".mp4", "$x$.mp4", "日.mp4", "b" * 251 + ".mp4",
    os.fsdecode(b"\xff\xfe.mp4"),
)  # fmt: skip
TOWER = ("--pretrained", "none", "--frames", "3", "--sampling", "tsn", "--layers", "2-3")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, their cache, and a run on it."""
    folder = tmp_path_factory.mktemp("made")
    clips = make_clips(folder / "videos", 4, broken=False)
    names = [f"{clip.path} {clips.classes[clip.label]}" for clip in clips.clips]
    (folder / "videos" / "list.txt").write_text("\n".join(names) + "\n")
    cache = extracted(folder / "videos", folder / "cache")
    train(cache, cache, options=OPTIONS, out=folder / "run", val_clips=[0, 1])
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the run."""
    for name in [name for name in os.environ if name.startswith("EVL_CACHE_")]:
        monkeypatch.delenv(name)
    (tmp_path / "run").symlink_to(made / "run")
    (tmp_path / "tower.json").symlink_to(made / "videos" / "tower.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that do on some clips what the clips' names say."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(decode_process, "WORKER", "tests.support.faulty_worker")


@pytest.fixture
def tree(work: Path, made: Path) -> Callable[..., Path]:
    """Makes folders of two classes with clips of these names, and healthy ones."""

    def make(*names: str) -> Path:
        for number, name in enumerate((*names, "good 0.mp4", "good 1.mp4", "good 2.mp4")):
            place = work / "tree" / ("one", "two")[number % 2] / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(made / "videos" / f"0{number % 4}.mp4", place)
        return work / "tree"

    return make


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [*map(str, args)], standalone_mode=False)


def extraction(tree: Path) -> list[str | Path]:
    return ["--dataset", "folder", "--root", tree, "--model", "tower.json", *TOWER]


def test_predict_labels_the_other_videos_and_says_which_failed(
    tree: Callable[..., Path], faulty: None
) -> None:
    found = run("predict", tree(*BAD, *SERVED), "--run", "run", "--clip-timeout", "2", "--json")
    assert found.return_value == 3, found
    report = json.loads(found.stdout)
    assert [Path(video["video"]).name for video in report["videos"]] == [
        "fine 1.mp4", "good 1.mp4", "good 0.mp4", "good 2.mp4",
    ]  # fmt: skip
    reasons = {Path(failure["video"]).name: failure["reason"] for failure in report["failures"]}
    assert reasons.keys() == set(BAD)
    assert "took longer than 2 s" in reasons["hangs.mp4"] and "SIGABRT" in reasons["aborts.mp4"]
    assert len(found.stderr.splitlines()) == 2 and found.stderr.count("aborts.mp4") == 1


def test_show_says_why_it_cannot_show_a_video(tree: Callable[..., Path], faulty: None) -> None:
    folder = tree(*BAD, *SERVED)
    for name, reason in (("aborts", "SIGABRT"), ("hangs", "took longer than 2 s")):
        (path,) = folder.glob(f"*/{name}.mp4")
        found = run("show", path, "--run", "run", "--clip-timeout", "2", "--out", "x.png")
        assert isinstance(found.exception, ClipError) and reason in str(found.exception)
        assert str(found.exception).count(f"{name}.mp4") == 1


def test_show_draws_a_cached_clip_whose_video_makes_a_decoder_abort(
    tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    assert run("extract", *extraction(tree("aborts.mp4")), "--cache", "cache").return_value == 0
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(decode_process, "WORKER", "tests.support.faulty_worker")
    found = run("show", "one/aborts.mp4", "--cache", "cache", "--out", "x.png")
    assert found.return_value == 0 and Path("x.png").is_file() and found.stderr == ""


def test_train_online_trains_on_the_other_clips(tree: Callable[..., Path], faulty: None) -> None:
    folder = tree(*BAD, *SERVED)
    Path("held.txt").write_text("one/good 1.mp4\n")
    found = run(
        "train", "--online", *extraction(folder), "--clip-timeout", "2", "--head", "linear", "--epochs", "1",
        "--batch", "4", "--val-clips", "held.txt", "--out", "online", "--json",
    )  # fmt: skip
    assert found.return_value == 3, found
    assert json.loads(found.stdout)["skipped_clips"] == 2
    told = [line for line in found.stderr.splitlines() if line.startswith("failed: ")]
    assert len(told) == 2 and all(line.count(".mp4") == 1 for line in told)


def test_estimate_measures_the_other_clips(tree: Callable[..., Path], faulty: None) -> None:
    found = run("estimate", *extraction(tree(*BAD)), "--measure", "--clip-timeout", "2", "--json")
    assert found.return_value == 0, found
    assert json.loads(found.stdout)["caches"][0]["measured_bytes"] > 0


def test_extract_records_what_failed_and_names_it_once(tree: Callable[..., Path], faulty: None) -> None:
    found = run("extract", *extraction(tree(*BAD, *SERVED)), "--cache", "cache", "--clip-timeout", "2")
    assert found.return_value == 3, found
    told = [line for line in found.stderr.splitlines() if line.startswith("failed: ")]
    assert len(told) == 2 and all(line.count(".mp4") == 1 for line in told)
    report = json.loads(run("info", "cache", "--json").stdout)
    assert sorted(failure["clip"] for failure in report["failures"]) == ["one/aborts.mp4", "two/hangs.mp4"]
    assert not any("mp4" in failure["reason"] for failure in report["failures"])


def test_repair_redoes_the_other_clips(tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tree("aborts.mp4")
    assert run("extract", *extraction(folder), "--cache", "cache").return_value == 0
    shard = max(Path("cache").glob("*/c.*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(decode_process, "WORKER", "tests.support.faulty_worker")
    found = run("repair", "cache", "--clip-timeout", "2")
    assert found.exception is None and found.return_value in (0, 1)
    assert FeatureCache("cache").is_valid.sum() >= 2


def test_a_pool_that_cannot_start_is_an_error_of_the_installation(
    tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_process, "WORKER", "no_such_module")
    folder = tree()
    Path("held.txt").write_text("one/good 0.mp4\n")
    online = [
        "--head",
        "linear",
        "--epochs",
        "1",
        "--batch",
        "4",
        "--val-clips",
        "held.txt",
        "--out",
        "online",
    ]
    for command in (
        ["predict", folder, "--run", "run"],
        ["show", folder / "one" / "good 0.mp4", "--run", "run"],
        ["train", "--online", *extraction(folder), *online],
        ["estimate", *extraction(folder), "--measure"],
        ["extract", *extraction(folder), "--cache", "cache"],
    ):
        found = run(*command)
        assert isinstance(found.exception, WorkerError), (command, found)


def test_pixels_of_the_run_are_asked_of_the_decoder(work: Path, made: Path) -> None:
    shutil.copytree(made / "run", "other")
    config = json.loads(Path("other/config.json").read_text())
    config["features"] = replace(CacheSpec.from_json(config["features"]), pixels="torchcodec-cpu").to_json()
    Path("other/config.json").write_text(json.dumps(config))
    found = run("predict", made / "videos" / "00.mp4", "--run", "other", "--decoder", "pyav")
    assert isinstance(found.exception, UsageError) and "torchcodec-cpu pixels" in str(found.exception)


# Names


def test_any_name_is_labelled_as_a_file_or_refused_with_a_reason(tree: Callable[..., Path]) -> None:
    folder = tree(*NAMES)
    found = run("predict", folder, "--run", "run", "--csv", "labels.csv")
    assert found.return_value == 0, (found, found.stderr)
    lines = found.stdout.splitlines()
    assert all(line.isprintable() for line in lines) and f"{folder}/two/\\xff\\xfe.mp4" in lines
    assert Path("labels.csv").read_text(encoding="utf-8").count("\\xff\\xfe.mp4") > 0
    report = json.loads(run("predict", folder, "--run", "run", "--json").stdout)
    assert {Path(video["video"]).name for video in report["videos"]} > set(NAMES)


def test_a_relative_name_is_no_address(tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tree(*NAMES)
    for place in ("one", "two"):
        monkeypatch.chdir(folder / place)
        found = run("predict", "--run", "../../run", "--topk", "1", "--", *os.listdir("."))
        assert found.return_value == 0, found.stderr
        monkeypatch.chdir("../..")


def test_broken_files_of_any_name_are_told_in_one_line_each(tree: Callable[..., Path]) -> None:
    folder = tree(*NAMES)
    for path in (folder / "one").iterdir():
        path.write_bytes(path.read_bytes()[:150])
    found = run("predict", folder, "--run", "run")
    lines = found.stderr.splitlines()
    assert found.return_value == 3 and len(lines) == len(list((folder / "one").iterdir()))
    assert all(line.isprintable() and line.startswith("failed: ") for line in lines)
    assert not any("http:x.mp4" in line.partition("http:x.mp4: ")[2] for line in lines)


def test_a_cache_and_a_run_hold_any_name(tree: Callable[..., Path]) -> None:
    folder = tree(*NAMES)
    broken = folder / "one" / NAMES[0]
    broken.write_bytes(broken.read_bytes()[:150])
    assert run("extract", *extraction(folder), "--cache", "cache").return_value == 3
    cache = FeatureCache("cache")
    assert {Path(clip.id).name for clip in cache.clips} > set(NAMES)
    assert run("verify", "cache").return_value == 0
    assert (
        run("extract", *extraction(folder), "--cache", "cache", "--json").return_value == 3
    )  # nothing to do
    json.loads(run("info", "cache", "--json").stdout.encode())
    for options in ((), ("--csv",)):
        assert "http:x.mp4" in run("info", "cache", "--failures", *options).stdout
    Path("held.txt").write_bytes(b"two/\xff\xfe.mp4\none/good 0.mp4\ntwo/-.mp4\n")
    done = run(
        "train",
        "--cache",
        "cache",
        "--val-clips",
        "held.txt",
        "--head",
        "linear",
        "--epochs",
        "1",
        "--out",
        "new",
    )
    assert done.return_value == 0, done
    assert "two/\\xff\\xfe.mp4" in Path("new/scored.csv").read_text(encoding="utf-8")


def test_a_cache_in_a_folder_of_any_name_is_verified_in_plain_lines(work: Path, made: Path) -> None:
    cache = work / "esc\x1b[31m"
    shutil.copytree(made / "cache", cache)
    verified = run("verify", cache)
    assert verified.return_value == 0 and "esc\\x1b[31m" in verified.stdout
    (chunk, *_) = (path for path in sorted((cache / "tokens").glob("c.*")))
    chunk.write_bytes(chunk.read_bytes()[:-1])
    damaged = run("verify", cache)
    assert damaged.return_value == 1 and "damaged: " in damaged.stderr
    assert not {"\x1b"} & set(verified.stdout + damaged.stdout + damaged.stderr)


def test_classes_of_any_name_are_trained_on_and_reported(
    tree: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    folder = tree()
    (folder / "one").rename(folder / os.fsdecode(b"$\xff$"))
    (folder / "two").rename(folder / "日 $x$\x1b")
    assert run("extract", *extraction(folder), "--cache", "cache").return_value == 0
    held = f"{FeatureCache('cache').clips[0].id}\n"
    Path("held.txt").write_bytes(os.fsencode(held))
    options = ["--val-clips", "held.txt", "--head", "linear", "--epochs", "1", "--out", "new"]
    assert run("train", "--cache", "cache", *options).return_value == 0
    for command in (["report", "new", "--out", "page"], ["predict", folder, "--run", "new"]):
        found = run(*command)
        assert found.return_value == 0, found
        assert found.stderr == "" and all(line.isprintable() for line in found.stdout.splitlines())
    assert Path("page/report.html").is_file()


def test_a_list_may_name_files_that_are_not_utf8(tree: Callable[..., Path]) -> None:
    folder = tree(*NAMES)
    (folder / "list.txt").write_bytes(b"two/\xff\xfe.mp4 left\none/http:x.mp4 right\none/good 0.mp4 left\n")
    options = extraction(folder)
    options[1] = "list"
    found = run("extract", *options, "--list", folder / "list.txt", "--cache", "cache")
    assert found.return_value == 0, found
    assert os.fsencode(FeatureCache("cache").clips[0].id) == b"two/\xff\xfe.mp4"


def test_show_draws_a_clip_of_any_name(tree: Callable[..., Path]) -> None:
    pytest.importorskip("matplotlib")
    folder = tree(*NAMES)
    assert run("extract", *extraction(folder), "--cache", "cache").return_value == 0
    for name in ("one/$x$.mp4", "two/日.mp4", os.fsdecode(b"two/\xff\xfe.mp4"), "two/new\nline.mp4"):
        clip = next(clip.id for clip in FeatureCache("cache").clips if clip.id.endswith(name[4:]))
        found = run("show", clip, "--cache", "cache", "--out", "x.png")
        assert found.return_value == 0, found


def test_a_list_in_utf16_is_refused(work: Path) -> None:
    Path("list.txt").write_text("00.mp4 left\n", encoding="utf-16")
    options = ["--dataset", "list", "--list", "list.txt", "--root", ".", "--model", "tower.json", *TOWER]
    found = run("extract", *options, "--cache", "cache")
    assert isinstance(found.exception, UsageError) and "expected UTF-8 lines" in str(found.exception)
