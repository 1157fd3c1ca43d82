"""Finding caches: several places, the list of them, the one that a head needs, and what is missing."""

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from evl_cache.caches import pairing
from evl_cache.caches.pairing import find_pair
from evl_cache.caches.places import NotSeen, cache_root, find_caches, split_places
from evl_cache.errors import UsageError
from evl_cache.notation import format_layers, parse_layers
from evl_cache.train.needs import HeadNeeds
from evl_cache.train.options import TrainOptions
from evl_cache_cli.main import cli, main
from tests.support.feature_caches import TOWER, write_cache
from tests.support.patience import patience_of_attempts


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("caches", ["caches"]),
        ("/a:/b::/c/", ["/a", "/b", "/c/"]),
        ("/a:s3://lab/caches:b", ["/a", "s3://lab/caches", "b"]),
        ("https://host:8443/x:/a", ["https://host:8443/x", "/a"]),
        ("http://host:80", ["http://host:80"]),
        ("http://user:p@host:8080/x:s3://b", ["http://user:p@host:8080/x", "s3://b"]),
        ("s3://bucket:/a", ["s3://bucket", "/a"]),
        ("http://[::1]:8000/caches:/data", ["http://[::1]:8000/caches", "/data"]),
        ("/data:http://[fe80::1%25eth0]/x:b", ["/data", "http://[fe80::1%25eth0]/x", "b"]),
        ("http://user:p@[::1]:8080:/a", ["http://user:p@[::1]:8080", "/a"]),
        ("http://user:p:q@host/x:rel", ["http://user:p:q@host/x", "rel"]),
        ("s3://key:secret@lab:/a:s3://b/c", ["s3://key:secret@lab", "/a", "s3://b/c"]),
        ("HTTPS://host:1:/a", ["HTTPS://host:1", "/a"]),
        ("http://[::1/x:/a", ["http://[::1/x", "/a"]),
        ("s3://key:sec/ret@lab/x:/a", ["s3://key:sec/ret@lab/x", "/a"]),
        ("ftp://host:21/x:/a", ["ftp://host:21/x", "/a"]),
        (":", []),
    ],
)
def test_places_are_parted_as_in_path_but_urls_stay_whole(text: str, places: list[str]) -> None:
    assert list(split_places(text)) == places


def test_lists_of_places_in_all_combinations_are_split_where_they_were_joined() -> None:
    drawn = random.Random(0)
    hosts = ["host", "127.0.0.1", "[::1]", "[2001:db8::7%25eth0]", "lab.example.org"]
    urls = [
        f"{scheme}://{login}{host}{port}{path}"
        for scheme in ("http", "https", "s3")
        for login in ("", "user@", "user:pass@", "us%40er:p:a!s$s@")
        for host in hosts
        for port in ("", ":1", ":65535")
        for path in ("", "/", "/a/b-1", "/a%3Ab?x")
    ]
    places = [*urls, *(["/data", "rel/ative", "caches", "/a b/é", "x"] * 100)]
    for _ in range(500):
        expected = tuple(drawn.choices(places, k=drawn.randrange(1, 6)))
        assert split_places(os.pathsep.join(expected)) == expected


@pytest.mark.parametrize("seed", range(40))
def test_any_text_as_a_place_ends_in_a_result_or_one_line(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No name is resolved: hosts are addresses of this computer, at a port where nothing answers."""
    drawn = random.Random(seed)
    parts = [
        "http", "https", "s3", "ftp", ":", "://", "/", "//", "[", "]", "[::1]", "127.0.0.1", ":1", ":99999", ":x", "@", "u:p",
        "?q", "#f", "%", "%zz", "caches", "..", " ", "\t", "\n", "é", "\udcff", "℀", "~", "-", "\x1b[31m", "*", "'", "",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    patience_of_attempts(monkeypatch)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for _ in range(6):
        text = "".join(drawn.choices(parts, k=drawn.randrange(1, 9)))
        for words in (["ls"], ["ls", text], ["info", text], ["pull", text], ["card", "--print", text]):
            if words[-1].startswith("-"):
                continue
            monkeypatch.setenv("EVL_CACHE_ROOT", text)
            with pytest.raises(SystemExit) as ended:
                main(words)
            told = capsys.readouterr().err.splitlines()
            assert ended.value.code in (0, 1, 2), (text, words, told)
            lines = [line for line in told if not line.startswith(("not seen: ", "note: ", "waiting "))]
            assert len(lines) <= 1 and not any("Traceback" in line for line in told), (text, words, told)
            assert all(line.isprintable() for line in told), (text, told)


@pytest.mark.parametrize(
    "url", ["http://[::1/x", "http://lab:secret@[::1/x", "https://host:secret/x", "s3://key:sec/ret@lab/x", "http://h℀/x"]
)  # fmt: skip
def test_what_is_no_url_is_one_line_in_every_command(
    url: str, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # In a list of places this is a URL and a directory.
    monkeypatch.setenv("EVL_CACHE_ROOT", "http://[::1" if url == "https://host:secret/x" else url)
    shutil.copytree(pair / "a", "mine")
    head = ("--head", "linear", "--steps", "1", "--device", "cpu")
    is_no_url = "is no URL, by its host or port; expected"
    for words, said in (
        (("ls",), is_no_url),
        (("ls", url), is_no_url),
        (("info", url), is_no_url),
        (("pull", url), "names URLs only; extract writes to a directory"),
        (("pull", url, "here"), is_no_url),
        (("pull", "mine", url), "pull writes to a directory"),
        (("push", "mine", url), "cannot be written to" if "http" in url else is_no_url),
        (("push", "mine", f"{url}/"), "cannot be written to" if "http" in url else is_no_url),
        (("push", "mine", url, "--layers", "3"), "a part is made in a directory"),
        (("card", "--print", url), is_no_url),
        (("card", url), "behind a URL cannot be written to"),
        (("card", "mine", "--print", "--address", url), is_no_url),
        (("train", "--dataset", "test", *head), is_no_url),
        (("train", "--cache", url, "--val-cache", "mine", *head), is_no_url),
        (("train", "--cache", "mine", "--val-cache", url, *head), is_no_url),
    ):
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        out, told = capsys.readouterr()
        assert ended.value.code in (1, 2), words
        assert len(told.splitlines()) == 1 and said in told, (words, told)
        assert "sec" not in out + told, (words, told)


def test_new_caches_go_to_the_first_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVL_CACHE_ROOT", "s3://lab/caches:/data/caches:/shared")
    assert cache_root() == Path("/data/caches")
    monkeypatch.setenv("EVL_CACHE_ROOT", "s3://lab/caches")
    with pytest.raises(UsageError, match="URLs only"):
        cache_root()


def needs_of(head: str, **more: Any) -> HeadNeeds:
    return HeadNeeds((TrainOptions(head=head, epochs=1, **more),))


@pytest.mark.parametrize("text", ["8-12", "9,11,12", "4", "1-2"])
def test_layers_are_written_as_they_are_read(text: str) -> None:
    assert format_layers(parse_layers(text)) == text


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a pair of caches; a test that changes it takes a copy."""
    root = tmp_path_factory.mktemp("pair")
    write_cache(root / "a", layers=(2, 3, 4))
    write_cache(root / "b", layers=(2, 3, 4), split="val", prefix="v")
    return root


def test_a_pair_is_found_across_places_and_a_place_may_be_a_cache(pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair / "b", tmp_path / "elsewhere" / "val")
    needs = needs_of("decoder3")
    for places in ([pair / "a", tmp_path / "elsewhere"], [pair / "a", tmp_path / "elsewhere" / "val"]):
        found = find_pair("test", places=places, needs=needs)
        assert [c.name for c in found] == ["a", "val"]
    (lacking,) = find_caches(tmp_path / "nowhere")
    assert isinstance(lacking, NotSeen) and lacking.reason.startswith("no such directory")


def test_a_cache_that_no_such_head_can_read_does_not_hide_the_pair(pair: Path, tmp_path: Path) -> None:
    """Its features have a width that the head's attention heads do not divide, and no maps, so that a head is asked."""
    write_cache(tmp_path / "odd", layers=(2, 3, 4), maps="none", tower=replace(TOWER, width=224))
    found = find_pair("test", places=[tmp_path, pair], needs=needs_of("decoder3"))
    assert [cache.name for cache in found] == ["a", "b"]


@pytest.mark.parametrize(
    "change",
    [
        {"tower": replace(TOWER, mean=(0.1, 0.2, 0.3))},
        {"tower": replace(TOWER, quick_gelu=False)},
        {"pixels": "nvdec"},
        {"classes": 4},
        {"maps": "fp16"},
    ],
)
def test_caches_that_train_would_refuse_or_of_other_extractions_are_no_pair(
    pair: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    write_cache(tmp_path / "b", layers=(2, 3, 4), split="val", prefix="v", **change)
    with pytest.raises(UsageError, match="a fits, but its validation cache is missing"):
        find_pair("test", places=[pair / "a", tmp_path], needs=needs_of("decoder3"))
    found = find_pair("test", places=[pair, tmp_path], needs=needs_of("decoder3"))
    assert [cache.place for cache in found] == [str(pair / "a"), str(pair / "b")]


def test_of_pairs_whose_frames_different_rules_chose_the_newest_is_found(pair: Path, tmp_path: Path) -> None:
    needs, old = needs_of("decoder3"), tmp_path / "old"
    write_cache(old / "c", layers=(2, 3, 4), frame_rule=1)
    write_cache(old / "d", layers=(2, 3, 4), split="val", prefix="v", frame_rule=1)
    assert [cache.name for cache in find_pair("test", places=[old], needs=needs)] == ["c", "d"]
    assert [cache.name for cache in find_pair("test", places=[old, pair], needs=needs)] == ["a", "b"]
    # A side that is there by one rule only goes with the pair of its own rule, or else with what there is.
    found = find_pair("test", places=[old, pair / "a"], needs=needs)
    assert [cache.name for cache in found] == ["c", "d"]
    found = find_pair("test", places=[old / "c", pair / "b"], needs=needs)
    assert [cache.name for cache in found] == ["c", "b"]


@pytest.mark.parametrize(
    ("needs", "command"),
    [
        (needs_of("decoder4"), "--layers 1-4 --frames 3 --sampling strided --stride 2"),
        (needs_of("decoder2", head_layers=(1, 3)), "--layers 1,3 --frames 3"),
    ],
)
def test_what_is_missing_is_told_with_the_command_that_makes_it(
    pair: Path, needs: HeadNeeds, command: str
) -> None:
    with pytest.raises(UsageError, match="run evl-cache extract --dataset test --model tiny") as raised:
        find_pair("test", places=[pair], needs=needs)
    assert command in str(raised.value)


def test_missing_maps_and_a_missing_side_are_told_with_their_commands(tmp_path: Path) -> None:
    write_cache(tmp_path / "a", maps="none")
    with pytest.raises(UsageError, match=r"a fits, but its validation cache .* --split val .* --maps none;?"):
        find_pair("test", places=[tmp_path], needs=needs_of("decoder3", temporal_cross_attention=False))
    with pytest.raises(UsageError, match="holds no attention maps; run evl-cache extract") as raised:
        find_pair("test", places=[tmp_path], needs=needs_of("decoder3"))
    assert "--maps uint8" in str(raised.value)
    other = tmp_path / "other"
    write_cache(other / "b", split="val", tower=replace(TOWER, model="ViT x"))
    with pytest.raises(UsageError, match=r"training cache is missing; .* --split train --model 'ViT x'"):
        find_pair("test", places=[other], needs=needs_of("decoder3"))
    with pytest.raises(UsageError, match="extract --dataset k400 --layers 9-12"):
        find_pair("k400", places=[other], needs=needs_of("decoder4"))


def test_caches_of_the_same_clips_are_no_pair(tmp_path: Path) -> None:
    train = write_cache(tmp_path / "a")
    write_cache(tmp_path / "b", split="val")
    with pytest.raises(UsageError, match="a fits, but b has the same clips, by their names") as raised:
        find_pair("test", places=[tmp_path], needs=needs_of("decoder3"))
    assert f"hold clips of it out (--cache {train.path} --val-clips FILE)" in str(raised.value)
    assert "run evl-cache extract --dataset test --root FOLDER --split val" in str(raised.value)
    shutil.rmtree(tmp_path / "b")
    write_cache(tmp_path / "b", split="val", labels=[0, 1, 2])
    with pytest.raises(UsageError, match="a fits, but b has some of its clips, by their names"):
        find_pair("test", places=[tmp_path], needs=needs_of("decoder3"))
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(UsageError, match="a fits, but its validation cache is missing; run evl-cache"):
        find_pair("test", places=[tmp_path], needs=needs_of("decoder3"))
    write_cache(tmp_path / "c", split="val", prefix="v")
    assert [c.name for c in find_pair("test", places=[tmp_path], needs=needs_of("decoder3"))] == ["a", "c"]


@pytest.mark.parametrize(
    ("needs", "maps", "said"),
    [
        (needs_of("decoder4"), "recompute", "layer 1 has no layer below .* use --maps uint8"),
        (
            needs_of("decoder20"),
            "uint8",
            "all layers of tiny would do .decoder20 reads 20 layers, the cache has 4 ",
        ),
        (needs_of("decoder2", head_layers=(7, 9)), "uint8", r"all layers of tiny .*\[7, 9\] are not cached"),
    ],
)
def test_what_no_extraction_can_give_is_told_without_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs: HeadNeeds, maps: str, said: str
) -> None:
    write_cache(tmp_path / "a", layers=(3, 4))
    (cache,) = find_caches(tmp_path)
    cache = replace(cache, spec=replace(cache.spec, maps=maps))
    monkeypatch.setattr(pairing, "find_caches", lambda place: [cache])
    with pytest.raises(UsageError, match=said) as raised:
        find_pair("test", places=[tmp_path], needs=needs)
    assert "evl-cache extract" not in str(raised.value)


def test_a_head_deeper_than_the_usual_model_has_no_command_either(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not even all layers of ViT-B-16-quickgelu would do") as raised:
        find_pair("test", places=[tmp_path], needs=needs_of("decoder20"))
    assert "evl-cache extract" not in str(raised.value)


def test_ls_lists_what_there_is_with_owner_size_and_completeness(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = Path(shutil.copytree(pair / "a", tmp_path / "half"))
    for name in ("manifest.json", "done/000001.json"):
        (half / name).unlink()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "zarr.json").write_text("{")
    monkeypatch.setenv("EVL_CACHE_ROOT", f"{pair}{os.pathsep}{tmp_path}")
    done = CliRunner().invoke(cli, ["ls", "--json"])
    assert done.exit_code == 0, done.output
    a, b, c = json.loads(done.stdout)["caches"]
    assert [Path(x["place"]).name for x in (a, b, c)] == ["a", "b", "half"]
    assert (a["dataset"], a["split"], a["model"], a["layers"], a["frames"], a["views"]) == (
        "test", "train", "tiny", "2-4", 3, "1x1",
    )  # fmt: skip
    assert a["nbytes"] == sum(f.stat().st_size for f in (pair / "a").glob("*/c.*"))
    assert a["is_complete"] and a["owner"] and a["modified"].endswith("+00:00")
    assert (c["blocks_done"], c["blocks"], c["is_complete"]) == (2, 3, False)
    table = CliRunner().invoke(cli, ["ls", str(pair), str(half)]).stdout.splitlines()
    assert len(table) == 4
    assert table[0].split()[:4] == ["data", "set", "split", "model"]
    assert "2 of 3 blocks" in table[3]


def test_ls_of_an_empty_place_says_what_to_do(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["ls", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (0, "")
    assert "run evl-cache extract" in done.stderr


def test_a_pair_whose_validation_labels_are_among_those_trained_on_is_found(tmp_path: Path) -> None:
    write_cache(tmp_path / "a", names=("x", "y", "z"))
    write_cache(tmp_path / "b", names=("z", "x"), labels=[0, 1], split="val", prefix="v")
    found = find_pair("test", places=[tmp_path], needs=needs_of("decoder3"))
    assert [cache.name for cache in found] == ["a", "b"]
    # Another data set of more classes, which are the same names: each goes with its own.
    write_cache(tmp_path / "c", names=("x", "z"), labels=[0, 1, 1], prefix="w")
    write_cache(tmp_path / "d", names=("x", "z"), labels=[0, 1], split="val", prefix="u")
    found = find_pair("test", places=[tmp_path], needs=needs_of("decoder3"))
    assert [cache.name for cache in found] == ["c", "d"]


def test_a_validation_cache_of_another_class_is_told_with_the_class(tmp_path: Path) -> None:
    write_cache(tmp_path / "a", names=("x", "y", "z"))
    write_cache(tmp_path / "b", names=("q", "x", "y"), labels=[0, 1], split="val", prefix="v")
    message = r"a fits, but .* is missing: b is like it, but for other classes, .* no class 'q' \(but 'z'\)"
    with pytest.raises(UsageError, match=message) as raised:
        find_pair("test", places=[tmp_path], needs=needs_of("decoder3"))
    assert "evl-cache extract" not in str(raised.value)
