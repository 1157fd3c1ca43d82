"""A wait that was ended is told as that, whatever was waited for: never as damage, as another cache, or as nothing there."""

import re

import pytest

from evl_cache.batches import FeatureLoader
from evl_cache.caches.card import cache_card
from evl_cache.caches.info import describe
from evl_cache.caches.listing import list_caches
from evl_cache.caches.share import pull
from evl_cache.errors import EvlCacheError, WaitEnded
from evl_cache.runs.directory import RunConfig
from evl_cache.runs.recorded import recorded_cache
from evl_cache.store import INDEX_NAME, FeatureCache, verify_cache
from evl_cache.store.objects import waits
from evl_cache.store.reading import attempts
from tests.support.feature_caches import write_cache
from tests.support.servers import faulty_server
from tests.support.silent_server import silent_server


def read_all(url, tmp_path):
    loader = FeatureLoader(FeatureCache(url), slice(None), layers=(2, 3, 4), batch=5)
    assert sum(len(batch.labels) for batch in loader.epoch()) == 13


def recorded(url, tmp_path):
    config = RunConfig(
        head="linear",
        head_config={},
        layers=(2,),
        classes=(),
        features=None,
        training={},
        caches={"val": {"path": url}},
    )
    recorded_cache(tmp_path, config, "val", option="--cache", trust=False)


DONE = {
    "read": read_all,
    "recorded": recorded,
    "info": lambda url, tmp_path: describe(url),
    "card": lambda url, tmp_path: cache_card(FeatureCache(url), license_name="unknown", address=None),
    "pull": lambda url, tmp_path: pull(url, str(tmp_path / "pulled"), threads=1),
    "verify": lambda url, tmp_path: verify_cache(url),
    "ls": lambda url, tmp_path: list(list_caches([url])),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    write_cache(folder / "indexed")
    write_cache(folder / "marked")
    (folder / "marked" / INDEX_NAME).unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize(
    ("name", "cache"), [*((name, "indexed") for name in DONE), ("read", "marked"), ("pull", "marked")]
)
def test_waits_that_are_ended_are_told_as_that(folder, tmp_path, monkeypatch, name, cache):
    """All from some request on: from the first, or from the first for a file of each kind."""
    real, asked = waits.Server.ask, []

    def ask(server, place, *more, **others):
        asked.append(re.sub(r"[0-9]+", "", place))
        if len(asked) > allowed:
            raise WaitEnded(f"{place}: no longer waited for")
        return real(server, place, *more, **others)

    def do(number):
        asked.clear()
        here = tmp_path / str(number)
        monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(here / "copies"))
        DONE[name](f"{server.url}/{cache}", here)

    monkeypatch.setattr(waits.Server, "ask", ask)
    with silent_server(folder, lambda path: None) as server:
        allowed = 1_000_000
        do(allowed)
        whole = tuple(asked)
        assert len(set(whole)) >= 3
        for allowed in sorted({whole.index(kind) for kind in whole}):
            try:
                do(allowed)
            except WaitEnded:
                continue
            except EvlCacheError as error:
                raise AssertionError(f"{asked[allowed]}: {error}") from error
            raise AssertionError(f"{asked[allowed]}: was not waited for, and nothing says so")


def test_a_wait_that_is_ended_while_it_is_seen_why_data_arrive_damaged(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "_BACKOFF_S", 0.001)
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    with faulty_server(folder) as server:
        cache = FeatureCache(f"{server.url}/marked")
        server.fault = lambda path, body: bytes(len(body)) if "/c." in path else None
        real = waits.Server.ask

        def ask(server, place, *more, **others):
            if "/c." not in place:  # the look whether another cache is there by now
                raise WaitEnded(f"{place}: no longer waited for")
            return real(server, place, *more, **others)

        monkeypatch.setattr(waits.Server, "ask", ask)
        with pytest.raises(WaitEnded):
            cache.read([0])
