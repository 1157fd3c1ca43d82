"""Servers behind a proxy: it is used, named where it fails, and told nothing that is meant for the server behind it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from evl_cache.errors import CacheError, EvlCacheError
from evl_cache.store import FeatureCache, open_objects
from tests.support.bad_servers import NOTHING_WRONG, BadServer, misbehaving_server
from tests.support.certificates import make_certificate
from tests.support.credentials import KEY_ID, PASSWORD, PROXY_PASSWORD, PROXY_USER, SECRET_KEY, USER
from tests.support.feature_caches import write_cache
from tests.support.patience import patience_of_attempts
from tests.support.proxies import Proxy, http_proxy
from tests.support.servers import free_port

LOGIN = (PROXY_USER, PROXY_PASSWORD)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_cache(folder / "a")
    shutil.rmtree(folder / "a" / "locks")
    return folder


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    patience_of_attempts(monkeypatch)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)


@pytest.fixture
def plain(root: Path) -> Iterator[BadServer]:
    with misbehaving_server(root, NOTHING_WRONG, login=(USER, PASSWORD), host="localhost") as server:
        yield server


@pytest.fixture
def safe(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BadServer]:
    certificate = make_certificate(tmp_path / "tls")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.path))
    tls = certificate.server_context()
    with misbehaving_server(root, NOTHING_WRONG, login=(USER, PASSWORD), tls=tls, host="localhost") as server:
        yield server


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy that wants a password."""
    with http_proxy(login=LOGIN) as running:
        yield running


def with_login(server: BadServer) -> str:
    return server.url.replace("://", f"://{USER}:{PASSWORD}@", 1)


def folders(server: BadServer) -> list[str]:
    return open_objects(with_login(server)).folders()


def test_a_server_with_tls_is_reached_through_a_tunnel_that_sees_no_login(
    safe: BadServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy.url())
    cache = FeatureCache(f"{with_login(safe)}/a")
    cache.read([0, 1])
    assert proxy.targets and set(proxy.targets) == {safe.url.removeprefix("https://")}


def test_a_plain_server_is_reached_through_a_proxy_that_passes_requests_on(
    plain: BadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What has no TLS is read on its way by all that pass it on, the password too.
    with http_proxy(login=LOGIN, passes_on=(PASSWORD,)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url())
        assert folders(plain) == ["a"]
        assert proxy.targets == [f"{plain.url}/"]
    assert not any("proxy-authorization" in head.lower() for head in plain.record.requests)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_hosts_that_need_no_proxy_are_reached_without_it(
    plain: BadServer, safe: BadServer, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", "other.example,localhost")
    assert folders(plain if scheme == "http" else safe) == ["a"]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_wants_a_password_says_where_it_goes(
    plain: BadServer, safe: BadServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    for given in (proxy.url(with_login=False), proxy.url().replace(PROXY_PASSWORD, PROXY_PASSWORD + "x")):
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", given)
        server = plain if scheme == "http" else safe
        url = server.url  # without a password, which a proxy of a plain server would see
        with pytest.raises(
            CacheError, match=r"the proxy wants user and password \(407\); .*HTTP_PROXY"
        ) as raised:
            open_objects(url).folders()
        assert PROXY_PASSWORD not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_dead_proxy_is_named_and_not_the_server(
    plain: BadServer, safe: BadServer, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    port = free_port()
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://{PROXY_USER}:{PROXY_PASSWORD}@127.0.0.1:{port}")
    words = rf"the proxy http://127\.0\.0\.1:{port} .*refused.*NO_PROXY=localhost"
    with pytest.raises(CacheError, match=words) as raised:
        folders(plain if scheme == "http" else safe)
    assert PROXY_PASSWORD not in str(raised.value)


def test_a_proxy_that_cannot_reach_the_server_is_told(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy.url())
    monkeypatch.setenv("HTTP_PROXY", proxy.url())
    for scheme in ("https", "http"):
        with pytest.raises(CacheError, match=r"proxy.*502|502 Bad Gateway"):
            open_objects(f"{scheme}://localhost:{free_port()}/x").folders()


@pytest.mark.parametrize("value", ["ftp://127.0.0.1:9", "http://[::1", "http://host:port", "http://"])
def test_a_proxy_that_is_no_address_is_one_line(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", value)
    with pytest.raises(EvlCacheError, match=r"the proxy .* is no address; expected") as raised:
        open_objects("http://localhost:1/x").folders()
    assert "\n" not in str(raised.value)


def test_a_bucket_behind_a_proxy_tells_of_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:1")
    monkeypatch.setenv("HTTP_PROXY", f"http://{PROXY_USER}:{PROXY_PASSWORD}@127.0.0.1:{free_port()}")
    with pytest.raises(CacheError, match="proxy") as raised:
        open_objects("s3://lab/a").folders()
    assert PROXY_PASSWORD not in str(raised.value)
