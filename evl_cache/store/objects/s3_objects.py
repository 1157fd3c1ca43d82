"""A cache's files in an S3 bucket, through boto3, which knows where Amazon's tools keep keys, profiles and endpoints."""

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3.exceptions
import boto3.session
import botocore
import botocore.exceptions as wrong
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from evl_cache.errors import CacheError, EvlCacheError, UsageError
from evl_cache.notation import without_logins
from evl_cache.store.objects.address import Data, public_url
from evl_cache.store.objects.bodies import read_known, read_most
from evl_cache.store.objects.causes import error_trouble
from evl_cache.store.objects.connections import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, tls_context
from evl_cache.store.objects.http_objects import range_nbytes
from evl_cache.store.objects.troubles import Trouble, status_trouble
from evl_cache.store.objects.waits import Attempt, Server

UNSIGNED_VARIABLE = "AWS_NO_SIGN_REQUEST"  # as GDAL and others name it
_PART_NBYTES = 8 << 20  # of an upload
_CONNECTIONS = 64
_MOST_FOLDERS = 100_000
_KEYS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and AWS_ENDPOINT_URL if not Amazon's"
)
# Codes that name a want of access, and what helps against each.
_DENIED = {
    "InvalidAccessKeyId": "the key AWS_ACCESS_KEY_ID (or of the profile) is not known there: " + _KEYS,
    "SignatureDoesNotMatch": "the secret AWS_SECRET_ACCESS_KEY (or of the profile) is not that of the key",
    "ExpiredToken": "the session has expired: sign in again (aws sso login), or renew AWS_SESSION_TOKEN",
    "InvalidToken": "the session is not valid there: sign in again, or unset AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "this computer's clock is wrong: set it",
}
_ELSEWHERE = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)
_T = TypeVar("_T")
_clients: dict[tuple[int, tuple[tuple[str, str], ...]], Any] = {}


class S3Objects:
    """Files below s3://bucket/prefix. See `WritableObjects`.

    Raises: UsageError where address, profile, endpoint or certificates are not what they should be.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = public_url(url)
        if "@" in parts.netloc:
            raise UsageError(
                f"{self.url}: an s3 address holds no key and secret; {_KEYS}, and give s3://bucket/prefix"
            )
        if not parts.netloc:
            raise UsageError(f"{self.url}: expected s3://bucket/prefix")
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self._server = Server(f"s3://{self._bucket}")
        self._client()  # so that what is wrong with the environment is told at once

    def get(self, name: str, *, most_nbytes: int) -> bytes:
        """See `Objects`."""

        def read(attempt: Attempt) -> bytes:
            with self._object(name) as found:
                if found["ResponseMetadata"]["HTTPStatusCode"] != 200:
                    raise Trouble.broken("a part of the file came for the whole")
                size, content = found.get("ContentLength"), None
                if size is None or size <= most_nbytes:
                    content = read_most(_Body(found["Body"]), most_nbytes, attempt)
                if content is None:
                    told = "more" if size is None else size
                    raise CacheError(f"{self.url}/{name}: has {told} bytes, expected at most {most_nbytes}")
                if not content and size is None:
                    raise Trouble.broken()  # among its headers
                return content

        return self._ask(name, read)

    def get_range(self, name: str, start: int, nbytes: int) -> Data:
        """See `Objects`."""

        def read(attempt: Attempt) -> Data:
            try:
                with self._object(name, Range=f"bytes={start}-{start + nbytes - 1}") as found:
                    expected = range_nbytes(str(found.get("ContentRange", "")), start, nbytes)
                    content = read_known(_Body(found["Body"]), expected, attempt)
                    if len(content) < expected:
                        raise Trouble.broken()
                    return content
            except wrong.ClientError as error:
                if _status(error) == 416:  # the file ends before `start`
                    return b""
                raise

        return self._ask(name, read) if nbytes else b""

    def folders(self) -> list[str]:
        """See `Objects`."""
        prefix = f"{self._prefix}/" if self._prefix else ""

        def read(attempt: Attempt) -> list[str]:
            found: list[str] = []
            pages = self._client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=prefix, Delimiter="/"):
                attempt.came(1 << 12)
                if "IsTruncated" not in page and "Name" not in page:
                    raise Trouble("what answers is no S3 server", "check AWS_ENDPOINT_URL", has_answered=True)
                found += [folder["Prefix"][len(prefix) : -1] for folder in page.get("CommonPrefixes", ())]
                if len(found) > _MOST_FOLDERS:
                    raise Trouble("its listing is too long", "name the cache itself", has_answered=True)
            return sorted(name for name in found if name not in ("", ".", ".."))

        return self._ask("", read)

    def put(self, name: str, data: bytes | Path) -> None:
        """See `WritableObjects`: the server compares sha256 digests."""

        def write(attempt: Attempt) -> None:
            with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as content:
                self._client().upload_fileobj(
                    content,
                    self._bucket,
                    self._key(name),
                    ExtraArgs={"ChecksumAlgorithm": "SHA256"},
                    Callback=attempt.came,
                    Config=TransferConfig(
                        multipart_threshold=_PART_NBYTES, multipart_chunksize=_PART_NBYTES, use_threads=False
                    ),
                )

        if isinstance(data, Path) and not data.is_file():
            raise CacheError(f"{data}: is gone; run the same command again")
        self._ask(name, write)

    def delete(self, name: str) -> None:
        """See `WritableObjects`."""

        def remove(attempt: Attempt) -> None:
            self._client().delete_object(Bucket=self._bucket, Key=self._key(name))

        with contextlib.suppress(FileNotFoundError):
            self._ask(name, remove)

    def end_waits(self) -> None:
        """See `Objects`."""
        self._server.end_waits()

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    @contextlib.contextmanager
    def _object(self, name: str, **options: Any) -> Iterator[Mapping[str, Any]]:
        found = self._client().get_object(Bucket=self._bucket, Key=self._key(name), **options)
        try:
            # Some servers keep how an upload was sent.
            encoding = {part.strip() for part in found.get("ContentEncoding", "").lower().split(",")}
            if encoded := sorted(encoding - {"", "identity", "aws-chunked"}):
                raise Trouble.compressed(", ".join(encoded))
            yield found
        finally:
            found["Body"].close()

    def _ask(self, name: str, request: Callable[[Attempt], _T]) -> _T:
        place = f"{self.url}/{name}".rstrip("/")

        def told(attempt: Attempt) -> _T:
            try:
                return request(attempt)
            except (wrong.BotoCoreError, wrong.ClientError, boto3.exceptions.Boto3Error) as error:
                raise self._trouble(error) from error
            except EvlCacheError:
                raise
            except (ValueError, OSError) as error:  # a header that is none, or of the system
                raise error_trouble(error, host=self._bucket, proxy=None) from error

        try:
            return self._server.ask(place, told)
        except FileNotFoundError:
            raise FileNotFoundError(f"{place}: no such file") from None

    def _trouble(self, error: Exception) -> Exception:
        """Return what an error of boto3 is for us."""
        if isinstance(error, boto3.exceptions.Boto3Error):  # of an upload, which says what it was made of
            inner = error.__cause__ or error.__context__
            error = inner if isinstance(inner, wrong.BotoCoreError | wrong.ClientError) else error
        if isinstance(error, wrong.ClientError):
            return self._answered(error)
        if isinstance(error, wrong.IncompleteReadError | wrong.ResponseStreamingError):
            return Trouble.broken()
        if isinstance(error, wrong.PartialCredentialsError):
            return UsageError(f"{self.url}: a key without its secret, or the reverse; {_KEYS}")
        if isinstance(error, wrong.NoCredentialsError):
            return Trouble(
                "no credentials are found", f"{_KEYS}; for a public bucket {UNSIGNED_VARIABLE}=yes"
            )
        if isinstance(error, wrong.CredentialRetrievalError | wrong.TokenRetrievalError | wrong.SSOError):
            return Trouble(f"credentials cannot be had ({_short(error)})", "sign in again (aws sso login)")
        host = urlsplit(self._client().meta.endpoint_url).hostname or self._bucket
        inner = getattr(error, "kwargs", {}).get("error")
        if isinstance(inner, BaseException):
            return error_trouble(inner, host=host, proxy=None)
        if isinstance(error, wrong.HTTPClientError):
            return error_trouble(error.__cause__ or error, host=host, proxy=None)
        return Trouble(
            f"the request fails ({without_logins(_short(error))})", "check bucket, endpoint and region"
        )

    def _answered(self, error: wrong.ClientError) -> Exception:
        status, code = _status(error), str(error.response.get("Error", {}).get("Code", ""))
        if code == "NoSuchBucket":
            return Trouble(
                "no such bucket", "create it, or check its name and AWS_ENDPOINT_URL", has_answered=True
            )
        if status == 404:
            return FileNotFoundError(code)
        if code in _DENIED:
            return Trouble("access denied", _DENIED[code], has_answered=True)
        if code in _ELSEWHERE:
            return Trouble(
                "the bucket is in another region", "set AWS_REGION to the bucket's own", has_answered=True
            )
        if status in (401, 403):
            return Trouble("access denied", _KEYS, has_answered=True)
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        if code in ("SlowDown", "RequestTimeout", "BadDigest", "InternalError"):
            return Trouble.broken(f"the server answers {code}")
        return status_trouble(status, headers)

    def _client(self) -> Any:
        """Return boto3's client, which all of a process share while the environment stays; a forked process makes its own."""
        settings = sorted(
            (name, value)
            for name, value in os.environ.items()
            if name.startswith(("AWS_", "SSL_", "HOME")) or name.lower().endswith("_proxy")
        )
        key = (os.getpid(), tuple(settings))
        if (client := _clients.get(key)) is None:
            client = _clients.setdefault(key, _make_client(self.url))
        return client


class _Body:
    """What bodies are read from: boto3's, whose reading can be ended."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def readinto(self, buffer: memoryview, /) -> int:
        return int(self._body.readinto(buffer))

    def shutdown(self) -> None:
        self._body._raw_stream.shutdown()  # urllib3's, which boto3 gives in no other way


def _make_client(url: str) -> Any:
    """Return boto3's client of the environment. Raises: UsageError where that is not what it should be."""
    options: dict[str, Any] = {
        "retries": {"total_max_attempts": 1},  # waits are ours
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": READ_TIMEOUT_S,
        "max_pool_connections": _CONNECTIONS,
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    if os.environ.get(UNSIGNED_VARIABLE, "").lower() in ("1", "yes", "true", "on"):
        options["signature_version"] = botocore.UNSIGNED
    variable = "AWS_CA_BUNDLE" if os.environ.get("AWS_CA_BUNDLE") else "SSL_CERT_FILE"
    if certificates := os.environ.get(variable):
        tls_context(variable)
    _keep_tokens_out_of_logs()
    try:
        session = boto3.session.Session()
        region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
        client = session.client("s3", region_name=region, config=Config(**options), verify=certificates)
        # Made beside their own name: a custom endpoint has no name for each bucket.
        if not client.meta.endpoint_url.endswith(".amazonaws.com"):
            options["s3"] = {"addressing_style": "path"}
            client = session.client("s3", region_name=region, config=Config(**options), verify=certificates)
            client.meta.events.register("before-call.s3", _stay_here)
        return client
    except wrong.ProfileNotFound as error:
        raise UsageError(
            f"{url}: {_short(error)}; set AWS_PROFILE to one of ~/.aws/config, or set AWS_ACCESS_KEY_ID"
        ) from error
    except (wrong.ConfigParseError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{url}: a file of AWS profiles cannot be read ({_short(error)}); mend it, or set AWS_ACCESS_KEY_ID"
        ) from error
    except wrong.PartialCredentialsError as error:
        raise UsageError(f"{url}: a key without its secret, or the reverse; {_KEYS}") from error
    except (wrong.BotoCoreError, ValueError) as error:
        named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        shown = f"AWS_ENDPOINT_URL is {public_url(named)!r}" if named else without_logins(_short(error))
        raise UsageError(f"{url}: {shown}; expected http://host:port or https://host") from error


def _keep_tokens_out_of_logs() -> None:
    """Keep botocore from logging requests, with the session's token, where a program logs everything: unless it asks."""
    log = logging.getLogger("botocore")
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)


def _stay_here(params: dict[str, Any], **_: Any) -> None:
    # botocore takes any redirect for one to Amazon's other regions, and asks for the region without end.
    params.get("context", {}).setdefault("s3_redirect", {})["redirected"] = True


def _status(error: wrong.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
