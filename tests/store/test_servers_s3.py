"""Buckets that cannot be read from: each cause gives a line of its own; files of AWS profiles are heeded as Amazon's tools do."""

import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from evl_cache.caches.share import push
from evl_cache.errors import CacheError, EvlCacheError
from evl_cache.store import FeatureCache, open_objects
from tests.support.bad_answers import Answer
from tests.support.bad_servers import NOTHING_WRONG, Always, BadServer, misbehaving_server
from tests.support.credentials import KEY_ID, SECRET_KEY, write_secret
from tests.support.feature_caches import write_cache
from tests.support.patience import patience_of_attempts
from tests.support.servers import KEYS, free_port, s3_server


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a bucket `lab` that holds a cache."""
    folder = tmp_path_factory.mktemp("s3")
    write_cache(folder / "a")
    with s3_server(folder / "log") as url, pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        push(folder / "a", "s3://lab/caches/a")
        yield url


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    patience_of_attempts(monkeypatch)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def keys(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    return "s3://lab/caches/a"


def line_of(url: str) -> str:
    with pytest.raises(EvlCacheError) as raised:
        FeatureCache(url)
    text = str(raised.value)
    assert "\n" not in text and ";" in text and SECRET_KEY not in text
    return text


def test_without_keys_it_says_what_gives_them(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    told = line_of("s3://lab/caches/a")
    assert "no credentials are found" in told and "AWS_ACCESS_KEY_ID" in told and "AWS_PROFILE" in told


def test_a_public_bucket_is_read_unsigned(
    keys: str, endpoint: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="open", ACL="public-read")
    write_cache(folder := tmp_path_factory.mktemp("open") / "a")
    push(folder, "s3://open/caches/a")
    for name in client.list_objects_v2(Bucket="open")["Contents"]:
        client.put_object_acl(Bucket="open", Key=name["Key"], ACL="public-read")
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "yes")
    assert FeatureCache("s3://open/caches/a").is_complete
    assert open_objects("s3://open/caches").folders() == ["a"]
    assert "access denied" in line_of(keys)  # the other bucket is not public


def test_a_key_without_its_secret_is_told(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "a key without its secret" in line_of(keys)


def test_a_profile_that_is_not_there_is_named(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    told = line_of(keys)
    assert "nobody" in told and "AWS_PROFILE" in told


def test_a_file_of_profiles_that_is_none_is_told(
    keys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    write_secret(tmp_path / "credentials", f"aws_secret_access_key = {SECRET_KEY}\n[x\n")
    told = line_of(keys)
    assert "file of AWS profiles" in told and "credentials" in told


def test_an_endpoint_without_its_scheme_is_told(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    told = line_of(keys)
    assert "AWS_ENDPOINT_URL" in told and "127.0.0.1:9000" in told and "http://" in told


def test_keys_region_and_endpoint_come_from_a_profile(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_secret(
        tmp_path / "credentials",
        f"[lab]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = {SECRET_KEY}\n",
    )
    (tmp_path / "config").write_text(f"[profile lab]\nendpoint_url = {endpoint}\nregion = eu-west-3\n")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert FeatureCache("s3://lab/caches/a").is_complete
    assert open_objects("s3://lab/caches").folders() == ["a"]
    (tmp_path / "config").write_text(
        f"[profile lab]\nservices = ours\n[services ours]\ns3 =\n  endpoint_url = {endpoint}\n"
    )
    assert open_objects("s3://lab").folders() == ["caches"]


def test_a_bucket_that_is_not_there_and_a_folder_that_is_empty_are_told_apart(keys: str) -> None:
    with pytest.raises(CacheError, match="no such bucket"):
        open_objects("s3://not-there/caches").folders()
    assert open_objects("s3://lab/not-there").folders() == []
    assert "no cache" in line_of("s3://lab/not-there")
    with pytest.raises(CacheError, match="bucket"):  # not: no cache here
        FeatureCache("s3://not-there/caches/a")


def test_an_endpoint_where_nobody_listens_is_named(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    assert "nothing listens there" in line_of(keys)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://no-such-host.invalid")
    assert "no-such-host.invalid is not known" in line_of(keys)


REFUSALS = {
    "InvalidAccessKeyId": (403, "AWS_ACCESS_KEY_ID .*is not known there"),
    "SignatureDoesNotMatch": (403, "AWS_SECRET_ACCESS_KEY .*is not that of the key"),
    "ExpiredToken": (400, "session has expired"),
    "RequestTimeTooSkewed": (403, "clock is wrong"),
    "AccessDenied": (403, "access denied"),
    "PermanentRedirect": (301, "another region; set AWS_REGION"),
    "SlowDown": (503, "503|SlowDown"),
    "InternalError": (500, "500|InternalError"),
}


@pytest.fixture
def refusing(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BadServer]:
    with misbehaving_server(root, NOTHING_WRONG, given=(KEY_ID,)) as server:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty")


@pytest.mark.parametrize("code", REFUSALS)
def test_what_a_server_of_buckets_refuses_is_told_by_its_code(refusing: BadServer, code: str) -> None:
    status, words = REFUSALS[code]
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>of the server</Message></Error>'.encode()
    refusing.answer = lambda request: (
        Answer(status=status, headers={"Content-Type": "application/xml"}, body=body), body
    )  # fmt: skip
    with pytest.raises(CacheError, match=words) as raised:
        open_objects("s3://lab/a").get("zarr.json", most_nbytes=1 << 20)
    assert "\n" not in str(raised.value)
    with pytest.raises(CacheError, match=words):
        open_objects("s3://lab/a").folders()


@pytest.mark.parametrize("body", [b"<html><body>Sign in</body></html>", b"", b"\x00\xff"])
def test_an_endpoint_that_is_no_s3_server_is_one_line(refusing: BadServer, body: bytes) -> None:
    refusing.answer = lambda request: (
        Answer(status=200, headers={"Content-Type": "text/html"}, body=body),
        body,
    )
    with pytest.raises(EvlCacheError) as raised:
        FeatureCache("s3://lab/a")
    assert "\n" not in str(raised.value)
    with pytest.raises(EvlCacheError) as raised:
        open_objects("s3://lab/a").folders()
    assert "\n" not in str(raised.value)


ANSWERS = {
    "no length": None,
    "chunked": None,
    "cut in headers": "the connection broke off|other bytes",
    "cut in the body": "the connection broke off",
    "gzip": "compresses its answers",
    "another range": "other bytes than were asked for",
    "redirect in a circle": "the server answers 302 Found",
}


@pytest.mark.parametrize("fault", ANSWERS)
def test_parts_of_a_bucket_come_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    content = bytes(range(256)) * 40
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "file").write_bytes(content)
    with misbehaving_server(tmp_path, NOTHING_WRONG, given=(KEY_ID,)) as server:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        server.schedule = Always(fault)
        objects, words = open_objects("s3://lab"), ANSWERS[fault]
        if words is None:
            assert objects.get("file", most_nbytes=1 << 20) == content
            assert bytes(objects.get_range("file", 100, 50)) == content[100:150]
            assert bytes(objects.get_range("file", len(content) - 5, 50)) == content[-5:]
            return
        with pytest.raises(CacheError, match=words):
            objects.get_range("file", 100, 50)
