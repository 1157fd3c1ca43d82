"""The printed extract command: read by a shell and by click, it asks for the same caches; whatever names hold, it is harmless."""

import json
import os
import random
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from evl_cache.caches.extract_command import extract_command
from evl_cache.caches.places import FoundCache, NotSeen, find_caches
from evl_cache.errors import UsageError
from evl_cache.extract import ExtractionJob, ExtractRequest, plan_extraction
from evl_cache.extract import request as request_module
from evl_cache.extract_options import EXTRACT_OPTIONS, VIEW_RECIPES, Role, options_with
from evl_cache.notation import command_line, format_layers
from evl_cache.spec import CODECS, MAP_STORAGE, TOKEN_STORAGE, ViewSpec
from evl_cache_cli.common import printable
from evl_cache_cli.extract_flags import make_request
from evl_cache_cli.main import cli
from tests.support.feature_caches import TOWER, write_cache
from tests.support.hostile import Forge

SETS = 120
TOWER_FILE = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 6, "head_width": 8, "mlp_ratio": 1.0},
}  # fmt: skip
AWKWARD = """-it's  "one" $(set); ünï & `x` #1"""
HOSTILE = (
    "k400; touch MARK #",
    "$(touch MARK)",
    "`touch MARK`",
    "a' ; touch MARK '",
    "-rf",
    "x & touch MARK",
    "~",
    "!!",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets of four kinds in folders with awkward names; files that look like clips and are empty."""
    folder = tmp_path_factory.mktemp("data") / AWKWARD
    for split, count in (("train", 5), ("val", 3)):
        for i in range(count):
            _touch(folder / "clips" / split / f"class {i % 2}" / f"{i}'s  clip.mp4")
            _touch(folder / "k400" / split / f"{split}{i:06d}_{i:06d}_{i + 10:06d}.mp4")
        rows = [f"{'ab'[i % 2]},{split}{i:06d},{i},{i + 10},{split}" for i in range(count)]
        text = "\n".join(["label,youtube_id,time_start,time_end,split", *rows]) + "\n"
        _touch(folder / f"-labels of {AWKWARD}" / f"{split}.csv", text)
    lists = folder / "ucfTrainTestlist"
    _touch(lists / "classInd.txt", "1 A\n2 B\n")
    for fold in (1, 2, 3):
        clips = [f"{'AB'[i % 2]}/v_{i}.avi" for i in range(6)]
        _touch(lists / f"testlist0{fold}.txt", "\n".join(clips[2 * fold - 2 : 2 * fold]) + "\n")
        train = [f"{clip} {1 + i % 2}" for i, clip in enumerate(clips) if i // 2 != fold - 1]
        _touch(lists / f"trainlist0{fold}.txt", "\n".join(train) + "\n")
    for i in range(6):
        _touch(folder / "ucf" / "AB"[i % 2] / f"v_{i}.avi")
    _touch(
        folder / f"list {AWKWARD}.txt",
        "".join(f"train/class {i % 2}/{i}'s  clip.mp4 {i % 2}\n" for i in range(5)),
    )
    _touch(folder / f"tower {AWKWARD}.json", json.dumps(TOWER_FILE))
    return folder


def _touch(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(autouse=True)
def _one_tower_and_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_module, "build_tower", _build_tower)
    for name in [name for name in os.environ if name.startswith("EVL_")]:
        monkeypatch.delenv(name)


_build_tower = lru_cache(maxsize=2)(request_module.build_tower)

# Values of every option that says what is extracted, but for where it lies, which belongs to the kind of data set.
Draw = Callable[[random.Random], object]
DRAWS: Mapping[str, Draw] = {
    "layers": lambda rng: rng.choice(["6", "3-5", "2,4,6", "2-3,6"]),
    "recipe": lambda rng: rng.choice(list(VIEW_RECIPES)),
    "frames": lambda rng: rng.randint(1, 40),
    "sampling": lambda rng: rng.choice(["tsn", "strided"]),
    "stride": lambda rng: rng.randint(1, 20),
    "views": lambda rng: rng.choice(["1x1", "3x1", "1x3", "2x3", "10X1"]),
    "train_views": lambda rng: rng.randint(1, 5),
    "augment_seed": lambda rng: rng.choice([0, 7, 2**40]),
    "flip": lambda rng: True,
    "tokens": lambda rng: rng.choice(TOKEN_STORAGE),
    "maps": lambda rng: rng.choice(MAP_STORAGE),
    "codec": lambda rng: rng.choice(CODECS),
    "compute_dtype": lambda rng: rng.choice(["float32", "float16", "bfloat16"]),
    "limit": lambda rng: rng.randint(1, 4),
    "allow_missing_percent": lambda rng: rng.choice([0, 12.5, 100]),
}
PLACES = {
    "dataset",
    "root",
    "split",
    "annotations",
    "list_path",
    "classes_path",
    "model",
    "pretrained",
    "cache",
}


def draw_options(rng: random.Random) -> dict[str, object]:
    """Options by field; they may contradict each other."""
    places: tuple[dict[str, object], ...] = (
        {"dataset": "folder", "root": "clips", "split": rng.choice([None, "train", "val", "validation"])},
        {"dataset": "folder", "root": "clips/train", "split": rng.choice([None, "train", "val"])},
        {
            "dataset": "list",
            "root": "clips",
            "list_path": f"list {AWKWARD}.txt",
            "split": rng.choice([None, "train", "test"]),
        },
        {
            "dataset": "k400",
            "root": "k400",
            "annotations": f"-labels of {AWKWARD}",
            "split": rng.choice([None, "train", "val"]),
        },
        {
            "dataset": "ucf101",
            "root": "ucf",
            "annotations": "ucfTrainTestlist",
            "split": rng.choice([None, "2", "train3", "test02", "split1", "val"]),
        },
    )
    tower = {"model": f"tower {AWKWARD}.json", "pretrained": "none"}
    share = rng.choice([0.1, 0.3])
    return (
        rng.choice(places) | tower | {name: draw(rng) for name, draw in DRAWS.items() if rng.random() < share}
    )


def parsed(words: list[str]) -> ExtractRequest:
    """The request of a command, by click."""
    group = cli.make_context("evl-cache", [], resilient_parsing=True)
    command = cli.get_command(group, words[1])
    assert command is not None and words[:2] == ["evl-cache", "extract"]
    return make_request(command.make_context(words[1], words[2:], parent=group).params)


def found(job: ExtractionJob) -> FoundCache:
    """The cache as its description has it once it is written and read."""
    return FoundCache(address="x", spec=job.spec, origin=json.loads(json.dumps(job.origin)))


def test_what_is_drawn_is_every_option_that_says_what_is_extracted() -> None:
    assert DRAWS.keys() | PLACES == {option.field for option in options_with(Role.REQUEST)}


def test_the_command_read_by_a_shell_and_by_click_asks_for_the_same_caches(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, done, fields = random.Random(0), 0, set()
    while done < SETS:
        options = draw_options(rng)
        words = [word for option in EXTRACT_OPTIONS for word in option.words(options.get(option.field))]
        monkeypatch.chdir(data)
        try:
            request = parsed(["evl-cache", "extract", *words])
            jobs = plan_extraction(request, device="cpu")
        except UsageError:
            continue  # they contradict each other
        done, fields = done + 1, fields | options.keys()
        caches = {job.spec.split: found(job) for job in jobs}
        whole_root = jobs[0].root.absolute()
        monkeypatch.chdir(tmp_path)
        for cache in caches.values():
            for wanted in {*caches, *([None] if len(caches) == 2 else [])}:
                command = extract_command(cache, split=wanted, layers=format_layers(cache.spec.layers))
                assert command is not None and command == printable(command) == shlex.join(
                    shlex.split(command)
                )
                jobs_again = plan_extraction(parsed(shlex.split(command)), device="cpu")
                assert {job.root for job in jobs_again} == {whole_root}
                made = {job.spec.split: job for job in jobs_again}
                assert wanted is not None or made.keys() == caches.keys(), command
                for job in jobs:
                    if wanted in (None, job.spec.split):
                        same = made[job.spec.split]
                        assert (same.spec, same.clips.clips) == (job.spec, job.clips.clips), (
                            words,
                            command,
                        )
                        assert same.spec.feature_id == job.spec.feature_id
    assert fields >= DRAWS.keys()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_strangers_name_is_one_word_to_a_shell_and_nothing_is_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "evl-cache").write_text("#!/bin/sh\nprintf '%s\\0' \"$@\" > told\n")
    (tmp_path / "bin" / "evl-cache").chmod(0o755)
    (opened,) = find_caches(
        write_cache(tmp_path / "cache", dataset=name, tower=replace(TOWER, model=name)).path
    )
    hostile = {
        "root": f"/{name}",
        "model": name,
        "pretrained": name,
        "list_path": name,
        "split": f"{name}1",
        "views": name,
    }
    command = extract_command(replace(opened, origin=hostile), split="val", layers="2-4")
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    subprocess.run(["sh", "-c", str(command)], cwd=tmp_path, env=environment, check=True, timeout=120)
    told = (tmp_path / "told").read_text().split("\0")[:-1]
    assert told == shlex.split(str(command))[1:] and name in told
    assert not (tmp_path / "MARK").exists()


def test_names_that_no_line_can_show_give_no_command(tmp_path: Path) -> None:
    (opened,) = find_caches(write_cache(tmp_path / "cache", dataset="a\u202eb").path)
    assert extract_command(opened, split="train", layers="2-4") is None
    shown = replace(opened, spec=replace(opened.spec, dataset="k400"))
    assert extract_command(shown, split="train", layers="2-4") is not None
    for value in ("/a\nb", "\x1b[31m", "/a\u2028b", "\udcff"):
        assert extract_command(replace(shown, origin={"root": value}), split="train", layers="2-4") is None


def test_a_quoted_word_reaches_the_terminal_as_it_is() -> None:
    assert (
        printable("run evl-cache extract --root 'a   b'\n  and\tmore  ")
        == "run evl-cache extract --root 'a   b' and more"
    )


ODD = (None, True, -1, 10**30, 1.5, "", "x", [], ["a"], {}, {"a": 1})


def test_an_origin_may_hold_anything(tmp_path: Path) -> None:
    forge = Forge(write_cache(tmp_path / "good").path, tmp_path)
    val = write_cache(tmp_path / "val", split="val", prefix="v").path
    (opened,) = find_caches(forge.cache)
    fields = [option.field for option in options_with(Role.KEPT)]
    for first in range(len(ODD)):
        origin = {name: ODD[(first + i) % len(ODD)] for i, name in enumerate(fields)}
        for split in ("train", "val", None):
            command = extract_command(replace(opened, origin=origin), split=split, layers="2-4")
            assert command is not None and shlex.join(shlex.split(command)) == command
    for origin in ({name: {"a": 1} for name in fields}, {name: [None] for name in fields}):
        forge.group(lambda own, origin=origin: own.update(recipe=origin | {"other": origin}))
        train = ["train", "--cache", forge.cache, "--val-cache", val, "--head", "decoder1", "--steps", "1"]
        out = tmp_path / type(origin["model"]).__name__
        for words in (["card", "--print", forge.cache], ["ls", forge.cache], [*train, "--out", out]):
            done = CliRunner().invoke(cli, list(map(str, words)))
            assert done.exit_code == 0, (words, done.output, done.exception)


@pytest.mark.parametrize("name", ["recipe", "created_with"])
def test_a_description_whose_parts_are_no_objects_is_damaged(name: str, tmp_path: Path) -> None:
    forge = Forge(write_cache(tmp_path / "good").path, tmp_path)
    forge.group(lambda own: own.update({name: ["x"]}))
    done = CliRunner().invoke(cli, ["card", "--print", str(forge.cache)])
    assert f"its {name} is no object; repair the cache" in str(done.exception)
    (damaged,) = find_caches(forge.cache)
    assert isinstance(damaged, NotSeen) and f"its {name} is no object" in damaged.reason


def test_a_card_names_files_and_not_where_they_lay(tmp_path: Path) -> None:
    forge = Forge(write_cache(tmp_path / "good", dataset="list").path, tmp_path)
    origin = {
        "root": "/secret/videos",
        "list_path": "/secret/my list.txt",
        "model": "/secret/tower.json",
        "limit": 13,
    }
    forge.group(lambda own: own.update(recipe=origin))
    text = CliRunner().invoke(cli, ["card", "--print", str(forge.cache)]).output
    assert (
        "--root VIDEOS --split train --list 'my list.txt' --model tower.json" in text
        and "--limit 13" in text
        and "secret" not in text
    )


def planned(*words: object) -> dict[str, FoundCache]:
    """The caches of a command, by split."""
    jobs = plan_extraction(parsed(["evl-cache", "extract", *map(str, words)]), device="cpu")
    return {job.spec.split: found(job) for job in jobs}


def again(command: str | None) -> dict[str, FoundCache]:
    """The caches of a printed command, read as a shell reads it where `env` takes variables away."""
    words = shlex.split(str(command))
    start = words.index("evl-cache")
    for name in words[2:start:2]:
        assert os.environ.pop(name)
    return planned(*words[start + 2 :])


def unsplit(cache: FoundCache) -> FoundCache:
    """The cache, as if no split had been asked for."""
    return replace(cache, origin={name: value for name, value in cache.origin.items() if name != "split"})


def like(cache: FoundCache, *, split: str | None) -> str | None:
    return extract_command(
        cache, split=split, layers=format_layers(cache.spec.layers), environ=dict(os.environ)
    )


FOLDER = ("--dataset", "folder", "--root", "clips")
TOWER_WORDS = ("--model", f"tower {AWKWARD}.json", "--pretrained", "none")


@pytest.mark.parametrize("asked", [None, "train", "val"])
def test_other_clips_of_a_set_without_splits_are_left_to_the_user(
    data: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None
) -> None:
    monkeypatch.chdir(data)
    split = [] if asked is None else ["--split", asked]
    (cache,) = planned("--dataset", "folder", "--root", "clips/train", *split, *TOWER_WORDS).values()
    other = "val" if asked == "train" else "train"
    assert f"--root FOLDER --split {other} " in str(like(cache, split=other))
    assert again(like(cache, split=None)) == again(like(cache, split=cache.spec.split))
    assert again(like(cache, split=None)).keys() == {asked or "all"}


def test_the_annotation_file_of_another_split_is_left_to_the_user(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    k400 = ("--dataset", "k400", "--root", "k400", *TOWER_WORDS)
    folder = f"-labels of {AWKWARD}"
    (cache,) = planned(*k400, "--annotations", f"{folder}/train.csv", "--split", "train").values()
    assert "--split val --annotations FILE " in str(like(cache, split="val"))
    assert again(like(cache, split=None)) == {"train": cache}
    lines = [(data / folder / f"{split}.csv").read_text().splitlines() for split in ("train", "val")]
    _touch(tmp_path / "both.csv", "\n".join(lines[0] + lines[1][1:]) + "\n")
    for place in (folder, tmp_path / "both.csv"):
        caches = planned(*k400, "--annotations", place)
        (cache,) = planned(*k400, "--annotations", place, "--split", "train").values()
        assert again(like(cache, split="val"))["val"].spec == caches["val"].spec


@pytest.mark.parametrize("asked", ["2 ", "train2 ", " Train_02", "split3", "val-3", "1"])
def test_a_fold_is_kept_as_its_reader_reads_it(
    data: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.chdir(data)
    ucf = ("--dataset", "ucf101", "--root", "ucf", "--annotations", "ucfTrainTestlist", "--split", asked)
    for split, cache in planned(*ucf, *TOWER_WORDS).items():
        assert again(like(cache, split=split))[split].spec == cache.spec


def test_links_are_named_and_not_what_they_lead_to(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blobs of a hub's client have no endings, and no siblings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blobs").mkdir()
    weights = Path(request_module.__file__).parent.parent / "data" / "evl-tiny.safetensors"
    targets = {
        "mine.json": data / f"tower {AWKWARD}.json",
        "hub.safetensors": weights,
        "ann/val.csv": data / f"-labels of {AWKWARD}" / "val.csv",
        "lists/val.txt": data / f"list {AWKWARD}.txt",
    }
    for i, (link, target) in enumerate(targets.items()):
        (tmp_path / "blobs" / str(i)).write_bytes(target.read_bytes())
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to(tmp_path / "blobs" / str(i))
    _touch(tmp_path / "ann" / "train.csv", (data / f"-labels of {AWKWARD}" / "train.csv").read_text())
    (tmp_path / "lists" / "train").symlink_to(data / "clips" / "train")
    mine = ("--model", "mine.json", "--pretrained", "none")
    for words in (
        (*mine, "--dataset", "folder", "--root", data / "clips"),
        ("--model", "evl-tiny", "--pretrained", "hub.safetensors", "--dataset", "folder", "--root", data / "clips"),
        (*mine, "--dataset", "k400", "--root", data / "k400", "--annotations", "ann/val.csv", "--split", "val"),
        (*mine, "--dataset", "list", "--list", "lists/val.txt", "--split", "val"),
    ):  # fmt: skip
        monkeypatch.chdir(tmp_path)
        caches = planned(*words)
        monkeypatch.chdir("/")
        for split, cache in caches.items():
            assert unsplit(again(like(cache, split=split))[split]) == unsplit(cache)


def test_a_file_that_has_the_name_of_a_model_is_not_taken_for_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("none", "evl-tiny"):
        _touch(tmp_path / name, "x")
    tower = ("--model", "evl-tiny", "--pretrained", "none")
    cache = planned("--dataset", "folder", "--root", data / "clips", *tower)["val"]
    assert "--model evl-tiny --pretrained none" in str(like(cache, split="val"))


def test_no_variable_of_the_environment_changes_what_the_command_makes(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    rng = random.Random(1)
    other = {name: str(draw(rng)) for name, draw in DRAWS.items()}
    other |= {"views": "2x3", "sampling": "tsn", "decoder": "torchcodec"} | dict.fromkeys(PLACES, "/x")
    caches = planned(*FOLDER, *TOWER_WORDS)
    for option in EXTRACT_OPTIONS:
        if option.field in other:
            monkeypatch.setenv(option.variable, other[option.field])
            for split in ("train", "val", None):
                made = again(like(caches["train"], split=split))
                assert made.keys() == ({split} if split else caches.keys())
                assert all(unsplit(cache) == caches[name] for name, cache in made.items()), option.flag
                monkeypatch.setenv(option.variable, other[option.field])
            monkeypatch.delenv(option.variable)
    monkeypatch.setenv("EVL_CACHE_EXTRACT_DECODER", "torchcodec")
    assert str(like(caches["val"], split="val")).startswith(
        "env -u EVL_CACHE_EXTRACT_DECODER evl-cache extract "
    )


VIEWS = ViewSpec(temporal_views=3)


@pytest.mark.parametrize(
    ("views", "of_train", "is_told"),
    [
        (VIEWS, None, True),
        (VIEWS, replace(VIEWS, temporal_views=1, train_views=2, augment_seed=5), True),
        (VIEWS, replace(VIEWS, temporal_views=1), False),
        (VIEWS, ViewSpec(frames=4), False),
        (VIEWS, ViewSpec(stride=4, train_views=2), False),
        (ViewSpec(train_views=3), None, False),
    ],
)
def test_views_that_no_option_gives_have_no_command(
    data: Path, monkeypatch: pytest.MonkeyPatch, views: ViewSpec, of_train: ViewSpec | None, is_told: bool
) -> None:
    monkeypatch.chdir(data)
    request = parsed(["evl-cache", "extract", *FOLDER, *TOWER_WORDS])
    request = replace(request, views=views, train_split_views=of_train)
    caches = {job.spec.split: found(job) for job in plan_extraction(request, device="cpu")}
    for own, cache in caches.items():
        for split in ("train", "val", None):
            command = like(cache, split=split)
            assert command is not None or not is_told
            if command is not None:
                made = again(command)
                assert all(made[name].spec == caches[name].spec for name in ([split] if split else caches))
        is_own_told = own == "train" or not views.train_views
        assert (like(cache, split=own) is not None) == is_own_told


@pytest.mark.parametrize(
    "words", [("--train-views", 1, "--augment-seed", 2**63 + 1), ("--train-views", 1001), ("--frames", 5000)]
)
def test_what_could_not_be_read_again_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...]
) -> None:
    monkeypatch.chdir(data)
    split = ("--split", "train", "--cache", tmp_path / "cache")
    done = CliRunner().invoke(cli, ["extract", *map(str, (*FOLDER, *TOWER_WORDS, *split, *words))])
    assert "could be read again: the cache's description: views." in str(done.exception)
    assert not (tmp_path / "cache").exists()


def test_words_that_begin_with_a_dash_are_no_options() -> None:
    assert command_line(("evl-cache", "info"), "-mine") == "evl-cache info -- -mine"
    assert command_line(("evl-cache", "info"), "m i") == "evl-cache info 'm i'"
    assert command_line(("evl-cache", "info"), "a\nb") is None


def test_the_card_of_an_older_origin_says_what_it_does_not_tell(tmp_path: Path) -> None:
    forge = Forge(write_cache(tmp_path / "good", dataset="list").path, tmp_path)
    origin = {"root": "/secret/videos", "model": "evl-tiny", "pretrained": "none"}
    for more, lists, is_said in (({}, "FILE", True), ({"is_whole": True, "list_path": "/a/b"}, "b", False)):
        forge.group(lambda own, more=more: own.update(recipe=origin | more))
        text = CliRunner().invoke(cli, ["card", "--print", str(forge.cache)]).output
        assert f"--dataset list --root VIDEOS --split train --list {lists} --model evl-tiny" in text
        assert ("An older version made it, which did not record list" in text) == is_said


def test_the_list_of_another_split_is_left_to_the_user(tmp_path: Path) -> None:
    (opened,) = find_caches(write_cache(tmp_path / "cache", dataset="list").path)
    opened = replace(opened, origin={"list_path": "/lists/train.txt"})
    assert "--split val --list FILE " in str(extract_command(opened, split="val", layers="2-4"))
    assert "--split train --list /lists/train.txt " in str(extract_command(opened, split=None, layers="2-4"))


def test_the_pixels_of_another_decoder_are_asked_for(tmp_path: Path) -> None:
    (opened,) = find_caches(write_cache(tmp_path / "cache").path)
    for pixels, words in (
        ("torchcodec-cuda", "--device cuda --decoder torchcodec"),
        ("torchcodec-x", ""),
        ("software", ""),
    ):
        command = extract_command(
            replace(opened, spec=replace(opened.spec, pixels=pixels)), split=None, layers="2"
        )
        assert str(command).endswith(words) and ("--decoder" in str(command)) == bool(words)


@pytest.mark.parametrize(
    ("flag", "taken", "refused"),
    [
        ("--limit", [1, 5], [0, True, 1.0, "1", 10**30]),
        ("--flip", [True], [1, "yes"]),
        ("--allow-missing", [0, 2.5], [-1, "5", True]),
        ("--recipe", ["k400-8"], ["k400", ["k400-8"]]),
        ("--list", ["a"], ["", 1]),
    ],
)
def test_values_that_an_option_takes_are_told_from_others(
    flag: str, taken: list[Any], refused: list[Any]
) -> None:
    (option,) = (option for option in EXTRACT_OPTIONS if option.flag == flag)
    assert all(map(option.accepts, taken)) and not any(map(option.accepts, refused))
