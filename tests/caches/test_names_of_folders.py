"""Caches in folders of any name are found and read where they lie; a place that is named twice is looked at once."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from evl_cache.caches.places import FoundCache, find_caches
from evl_cache.store import FeatureCache
from evl_cache_cli.main import main
from tests.support.feature_caches import write_cache
from tests.support.servers import KEYS, Nginx, nginx, s3_server

NAMES = ("a b", "50%", "a%20b", "a+b", "übung", "c#1", "d?e", "x&y=z;w")


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with nginx(tmp_path_factory.mktemp("nginx")) as server:
        cache = tmp_path_factory.mktemp("made") / "a"
        write_cache(cache)
        for name in NAMES:
            shutil.copytree(cache, server.www / name)
        yield server


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    monkeypatch.setenv("EVL_CACHE_SERVER_PATIENCE", "5")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return ended.value.code, capsys.readouterr().out


def test_folders_of_a_server_may_have_any_name(
    web: Nginx, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [seen for seen in find_caches(web.url) if isinstance(seen, FoundCache)]
    assert sorted(cache.address for cache in found) == sorted(f"{web.url}/{quote(name)}" for name in NAMES)
    assert len({FeatureCache(cache.address).spec.content_id for cache in found}) == 1
    assert len(json.loads(run(capsys, "ls", web.url, "--json")[1])["caches"]) == len(NAMES)
    monkeypatch.setenv("EVL_CACHE_ROOT", str(tmp_path / "mine"))
    assert run(capsys, "pull", f"{web.url}/{quote('a%20b')}")[0] == 0
    assert (tmp_path / "mine/a%20b/manifest.json").is_file()


def test_prefixes_of_a_bucket_may_have_any_name_that_an_address_can_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(tmp_path / "a")
    with s3_server(tmp_path / "log") as url:
        for name, value in (KEYS | {"AWS_ENDPOINT_URL": url}).items():
            monkeypatch.setenv(name, value)
        names = sorted(name for name in NAMES if not set("#?") & set(name))
        for name in names:
            assert run(capsys, "push", str(tmp_path / "a"), f"s3://lab/{name}")[0] == 0
        assert [seen.address for seen in find_caches("s3://lab")] == [f"s3://lab/{name}" for name in names]
        assert run(capsys, "ls", "s3://lab")[0] == 0


def test_a_place_that_is_named_twice_is_looked_at_once(
    web: Nginx, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "caches"
    write_cache(root / "a", layers=(2, 3))
    write_cache(root / "v", layers=(2, 3), split="val", prefix="v")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(root)
    monkeypatch.setenv("EVL_CACHE_ROOT", f"{root}:{root}/:{tmp_path / 'link'}")
    found = json.loads(run(capsys, "ls", "--json")[1])["caches"]
    assert [cache["place"] for cache in found] == [f"{root}/a", f"{root}/v"]
    words = (
        "--head",
        "linear",
        "--steps",
        "1",
        "--batch",
        "4",
        "--device",
        "cpu",
    )
    assert run(capsys, "train", "--dataset", "test", *words)[0] == 0
    url = f"{web.url}/{quote('a b')}"
    assert len(json.loads(run(capsys, "ls", url, f"{url}/", "--json")[1])["caches"]) == 1
