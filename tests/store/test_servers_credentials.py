"""Credentials go to the host that they were given for, to no other, and are written and shown nowhere."""

import logging
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from evl_cache.errors import CacheError, EvlCacheError, UsageError
from evl_cache.store import FeatureCache, open_objects
from tests.support import recorded
from tests.support.bad_servers import NOTHING_WRONG, BadServer, misbehaving_server
from tests.support.certificates import make_certificate
from tests.support.credentials import (
    COOKIE,
    KEY_ID,
    OTHER_PASSWORD,
    OTHER_USER,
    PASSWORD,
    SECRET_KEY,
    USER,
    basic,
    declare,
    nothing_declared,
    write_secret,
)
from tests.support.feature_caches import write_cache
from tests.support.patience import patience_of_attempts
from tests.support.redirects import redirecting
from tests.support.servers import faulty_server, nginx, s3_server


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_cache(folder / "a")
    return folder


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    patience_of_attempts(monkeypatch)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def guarded(root: Path) -> Iterator[BadServer]:
    """A server that asks for a password."""
    with misbehaving_server(root, NOTHING_WRONG, login=(USER, PASSWORD)) as server:
        yield server


def with_login(url: str, user: str = USER, password: str = PASSWORD) -> str:
    return url.replace("://", f"://{user}:{password}@", 1)


def netrc(tmp_path: Path, text: str, **options: int) -> Path:
    return write_secret(tmp_path / "netrc", text, **options)


# The search itself: it can fail


def send(url: str, **headers: str) -> None:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        error.close()


def test_a_login_at_a_server_that_it_was_not_given_for_is_found(tmp_path: Path, root: Path) -> None:
    with (
        faulty_server(root) as plain,
        misbehaving_server(root, NOTHING_WRONG, login=(USER, PASSWORD)) as guarded,
        nginx(tmp_path / "nginx") as web,
        s3_server(tmp_path / "s3") as s3,
    ):
        recorded.problems(None, [])
        for url, header in (
            (plain.url, {"Authorization": f"Basic {basic(USER, PASSWORD)}"}),
            (guarded.url, {"Authorization": f"Basic {basic(OTHER_USER, OTHER_PASSWORD)}"}),
            (web.url, {"Cookie": f"session={COOKIE}"}),
            (s3, {"X-Amz-Security-Token": COOKIE}),
            (plain.url, {"Referer": f"http://x/?p={OTHER_PASSWORD}"}),
        ):
            send(f"{url}/a/zarr.json", **header)
            (problem,) = recorded.problems(None, [])
            assert "given for this server" in problem
        send(f"{plain.url}/{SECRET_KEY}/zarr.json")
        assert "the URL holds" in recorded.problems(None, [])[0]
        send(f"{guarded.url}/a/zarr.json", Authorization=f"Basic {basic(USER, PASSWORD)}")
        send(f"{s3}/lab", Authorization=f"AWS4-HMAC-SHA256 Credential={KEY_ID}/x")
        assert recorded.problems(None, []) == []


def test_a_secret_in_a_file_an_output_or_a_log_is_found(tmp_path: Path, root: Path) -> None:
    with faulty_server(root):
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "card.md").write_bytes(b"\x00 http://lab:" + PASSWORD.encode() + b"@host")
        (tmp_path / "log").write_text(f"Basic {basic(USER, PASSWORD)}")
        assert len(recorded.problems(tmp_path, [])) == 2
        write_secret(tmp_path / "log", f"Basic {basic(USER, PASSWORD)}")
        assert len(recorded.problems(tmp_path, [])) == 1
        with nothing_declared():
            assert len(recorded.problems(tmp_path, [])) == 2
        (tmp_path / "deep" / "card.md").unlink()
        assert recorded.problems(tmp_path, [f"error: {SECRET_KEY}"]) == [
            f"{SECRET_KEY} was printed or logged"
        ]
        assert recorded.problems(tmp_path, []) == []


# Redirects


@pytest.mark.parametrize("what", ["listing", "file", "range"])
@pytest.mark.parametrize("source", ["url", "netrc"])
def test_a_redirect_to_another_server_takes_no_password_along(
    root: Path, guarded: BadServer, tmp_path: Path, what: str, source: str
) -> None:
    url = with_login(guarded.url) if source == "url" else guarded.url
    # A host has one entry; the server that is led to has another name.
    netrc(tmp_path, f"machine 127.0.0.1 login {USER} password {PASSWORD}\n" if source == "netrc" else "")
    with misbehaving_server(root, NOTHING_WRONG, host="localhost") as other:
        redirecting(guarded, f"{other.url}")
        objects = open_objects(f"{url}/a") if what != "listing" else open_objects(url)
        if what == "listing":
            assert objects.folders() == ["a"]
        elif what == "file":
            assert objects.get("zarr.json", most_nbytes=1 << 20) == (root / "a/zarr.json").read_bytes()
        else:
            assert bytes(objects.get_range("zarr.json", 3, 5)) == (root / "a/zarr.json").read_bytes()[3:8]
        assert guarded.asked


def test_another_port_of_the_same_host_is_another_server(root: Path, guarded: BadServer) -> None:
    with misbehaving_server(root, NOTHING_WRONG) as other:
        redirecting(guarded, other.url)
        assert open_objects(with_login(guarded.url) + "/a").get("zarr.json", most_nbytes=1 << 20)


def test_from_https_to_http_of_the_same_host_no_password_goes_along(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path / "tls")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.path))
    context = certificate.server_context()
    with (
        misbehaving_server(root, NOTHING_WRONG, host="localhost") as plain,
        misbehaving_server(
            root, NOTHING_WRONG, login=(USER, PASSWORD), tls=context, host="localhost"
        ) as safe,
    ):
        assert open_objects(with_login(safe.url)).folders() == ["a"]
        redirecting(safe, plain.url)
        assert open_objects(with_login(safe.url) + "/a").get("zarr.json", most_nbytes=1 << 20)


def test_from_http_to_https_of_the_same_host_reads_or_says_why(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path / "tls")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.path))
    with (
        misbehaving_server(root, NOTHING_WRONG, tls=certificate.server_context(), host="localhost") as safe,
        misbehaving_server(root, NOTHING_WRONG, host="localhost") as plain,
    ):
        redirecting(plain, safe.url)
        assert open_objects(f"{plain.url}/a").get("zarr.json", most_nbytes=1 << 20)


def test_netrc_of_another_host_is_not_used(root: Path, tmp_path: Path) -> None:
    netrc(tmp_path, f"machine elsewhere.example login {OTHER_USER} password {OTHER_PASSWORD}\n")
    with misbehaving_server(root, NOTHING_WRONG) as server:
        assert open_objects(server.url).folders() == ["a"]


# The password file


def test_a_password_file_that_cannot_be_used_hinders_no_public_server_and_is_named_where_one_is_needed(
    root: Path, guarded: BadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = f"machine 127.0.0.1 login {USER} password {PASSWORD}\n"
    other = f"machine elsewhere.example login {OTHER_USER} password {OTHER_PASSWORD}\n"
    cases = {
        "slip": (
            f"{entry}machine 127.0.0.1 logn {USER}\n",
            0o600,
            r"netrc has a mistake in line 2, .*mend it",
        ),
        "other host": (other, 0o600, r"put user and password for the host into .*netrc"),
        "wrong password": (
            entry.replace(PASSWORD, PASSWORD + "x"),
            0o600,
            "refuses the user and password of .*netrc",
        ),
    }
    for text, mode, words in cases.values():
        netrc(tmp_path, text, mode=mode)
        with pytest.raises(CacheError, match=words) as raised:
            open_objects(guarded.url).folders()
        assert "\n" not in str(raised.value)
    for path in (tmp_path / "missing", tmp_path):  # a directory cannot be read by anybody
        monkeypatch.setenv("NETRC", str(path))
        with pytest.raises(CacheError, match=r"netrc|NETRC|" + path.name):
            open_objects(guarded.url).folders()
    netrc(tmp_path, cases["slip"][0])
    with misbehaving_server(root, NOTHING_WRONG, given=(PASSWORD,)) as public:
        for value in ("netrc", "missing", ""):
            monkeypatch.setenv("NETRC", str(tmp_path / value))
            assert open_objects(public.url).folders() == ["a"]


def test_a_password_file_that_others_may_read_is_refused_with_the_remedy(
    root: Path, guarded: BadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = f"machine 127.0.0.1 login {USER} password {PASSWORD}\n"
    netrc(tmp_path, entry, mode=0o644)
    assert open_objects(guarded.url).folders() == ["a"]  # who names the file with NETRC may have it so
    monkeypatch.delenv("NETRC")
    monkeypatch.setenv("HOME", str(tmp_path))
    netrc(tmp_path, entry, mode=0o644).rename(declare(tmp_path / ".netrc"))
    with pytest.raises(
        CacheError, match=r"netrc may be read by others, so it is not used; chmod 600 ~/\.netrc"
    ):
        open_objects(guarded.url).folders()
    with misbehaving_server(root, NOTHING_WRONG) as public:
        assert open_objects(public.url).folders() == ["a"]
    (tmp_path / ".netrc").chmod(0o600)
    assert open_objects(guarded.url).folders() == ["a"]


def test_a_password_in_a_url_is_shown_nowhere(
    guarded: BadServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = FeatureCache(with_login(f"{guarded.url}/a"))
    cache.read([0, 1])
    sys.stdout.write(f"{cache.place} {cache.path} {cache!r}")
    with pytest.raises(EvlCacheError):
        FeatureCache(with_login(f"{guarded.url}/none"))
    assert PASSWORD not in "".join(capfd.readouterr())


# S3


def test_keys_in_an_s3_url_are_refused_and_reach_no_server(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with misbehaving_server(root, NOTHING_WRONG) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        with pytest.raises(UsageError, match="AWS_ACCESS_KEY_ID") as raised:
            open_objects(f"s3://{KEY_ID}:{SECRET_KEY}@lab/a").folders()
        assert SECRET_KEY not in str(raised.value)
        assert not server.asked


def test_an_endpoint_that_redirects_gets_no_keys_sent_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    with (
        misbehaving_server(root, NOTHING_WRONG, host="localhost") as other,
        misbehaving_server(root, NOTHING_WRONG, given=(KEY_ID,)) as endpoint,
    ):
        redirecting(endpoint, other.url)
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.url)
        with pytest.raises(CacheError, match="the server answers 302 Found"):
            open_objects("s3://lab/a").get("zarr.json", most_nbytes=1 << 20)
        assert endpoint.asked
