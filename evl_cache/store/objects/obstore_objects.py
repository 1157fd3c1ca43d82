"""HTTP servers and S3 buckets through obstore, which retries with back-off. Only this module knows it.

Credentials are used and never shown, logged or kept: a URL's user and password are taken out of it at once.
"""

import base64
import configparser
import contextlib
import datetime
import netrc
import os
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import HTTPStore, S3Store

from evl_cache.errors import CacheError, UsageError
from evl_cache.store.objects.address import SCHEMES, Data, public_url

RETRIES = 6
_BACKOFF_S = (0.1, 5.0)  # first, longest
_RETRY_TIMEOUT_S = 120.0
_AGAIN_S = (0.1, 0.4, 1.6, 6.4)  # waits before an answer that broke off is asked for again
_READ_TIMEOUT_S = 60  # without a byte
_MOST_REASON_CHARACTERS = 300
_PART_NBYTES = 8 << 20
_LINK = re.compile(rb'href="([^"/?#]+)/"', re.IGNORECASE)
_MOST_LISTING_NBYTES = 16 << 20
_T = TypeVar("_T")


class RemoteObjects:
    """Files below a URL. See `WritableObjects`; only S3 takes writes.

    Raises: UsageError for a URL of another kind.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES or not parts.netloc:
            raise UsageError(
                f"{public_url(url)}: expected s3://bucket/prefix, http://host/path or https://host/path"
            )
        if parts.query or parts.fragment:
            raise UsageError(f"{public_url(url)}: give the cache's own address, without ? and #")
        self.url = public_url(url)
        self.is_s3 = parts.scheme == "s3"
        self._headers = {} if self.is_s3 else _login_header(url)
        self._store: Any = (
            _s3_store(parts.netloc, parts.path)
            if self.is_s3
            else HTTPStore(self.url, **_options(self._headers))
        )

    def get(self, name: str, *, most_nbytes: int) -> bytes:
        """See `Objects`."""

        def read() -> bytes:
            found = obstore.get(self._store, name)
            if found.meta["size"] > most_nbytes:
                raise CacheError(
                    f"{self.url}/{name}: has {found.meta['size']} bytes, expected at most {most_nbytes}"
                )
            return bytes(found.bytes())

        return self._told(name, read)

    def get_range(self, name: str, start: int, nbytes: int) -> Data:
        """See `Objects`."""

        def read() -> Data:
            try:
                return memoryview(obstore.get_range(self._store, name, start=start, length=nbytes))
            except BaseError as error:
                if re.search(r"\b416\b", str(error)):  # the file ends before `start`
                    return b""
                raise

        return self._told(name, read)

    def folders(self) -> list[str]:
        """See `Objects`. An HTTP server's folders are what the links of its listing lead to."""
        if self.is_s3:
            found = self._told("", lambda: obstore.list_with_delimiter(self._store))
            return sorted(str(prefix).rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"])
        page = self._told("", self._listing_page)
        return sorted(
            {unquote(link.decode("ascii", "replace")) for link in _LINK.findall(page)} - {".", ".."}
        )

    def _listing_page(self) -> bytes:
        # Pages made on the fly come without a length, which obstore insists on.
        request = urllib.request.Request(f"{self.url}/", headers=self._headers)
        with urllib.request.urlopen(request, timeout=_READ_TIMEOUT_S) as answer:
            page: bytes = answer.read(_MOST_LISTING_NBYTES)
        return page

    def put(self, name: str, data: bytes | Path) -> None:
        """See `WritableObjects`: the server compares sha256 digests."""
        try:
            self._told(name, lambda: obstore.put(self._store, name, data, chunk_size=_PART_NBYTES))
        except FileNotFoundError as error:
            raise CacheError(f"{self.url}: no such bucket; create it, or name another one") from error

    def delete(self, name: str) -> None:
        """See `WritableObjects`."""
        with contextlib.suppress(FileNotFoundError):
            self._told(name, lambda: obstore.delete(self._store, name))

    def end_waits(self) -> None:
        """See `Objects`."""

    def _told(self, name: str, action: Callable[[], _T]) -> _T:
        """Return what an action returns, and raise its errors as ours. An answer that breaks off is asked for again."""
        place = f"{self.url}/{name}".rstrip("/")
        try:
            for wait_s in _AGAIN_S:
                try:
                    return action()
                except BaseError as error:  # obstore itself retries until an answer begins
                    if "body error" not in str(error):
                        raise
                    time.sleep(wait_s)
            return action()
        except FileNotFoundError:
            raise FileNotFoundError(f"{place}: no such file") from None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise CacheError(f"{place}: access denied; {self._access_remedy()}") from error
        except (BaseError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            if re.search(r"\b40[13]\b|Unauthorized|Forbidden|AccessDenied", reason):
                raise CacheError(f"{place}: access denied; {self._access_remedy()}") from error
            raise CacheError(
                f"{place}: cannot be reached or fails ({_short(reason)}); check the address and the connection, "
                "then run the same command again"
            ) from error

    def _access_remedy(self) -> str:
        if self.is_s3:
            return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and AWS_ENDPOINT_URL if not Amazon's"
        return "put user and password for the host into ~/.netrc"


def _short(reason: str) -> str:
    # obstore's texts end in a debugging view of the error.
    return reason.partition("Debug source")[0].strip()[:_MOST_REASON_CHARACTERS]


def _options(headers: dict[str, str]) -> Any:
    client: dict[str, Any] = {
        "allow_http": True,
        "timeout": datetime.timedelta(hours=1),
        "read_timeout": datetime.timedelta(seconds=_READ_TIMEOUT_S),
        "connect_timeout": datetime.timedelta(seconds=10),
    }
    if headers:
        client["default_headers"] = headers
    certificates = os.environ.get("SSL_CERT_FILE")
    if certificates and Path(certificates).is_file():
        client["root_certificate"] = Path(certificates).read_bytes()
    first, longest = (datetime.timedelta(seconds=s) for s in _BACKOFF_S)
    retries = {
        "max_retries": RETRIES,
        "retry_timeout": datetime.timedelta(seconds=_RETRY_TIMEOUT_S),
        "backoff": {"init_backoff": first, "max_backoff": longest, "base": 2},
    }
    return {"client_options": client, "retry_config": retries}


def _login_header(url: str) -> dict[str, str]:
    parts = urlsplit(url)
    if parts.username is not None:
        user, password = unquote(parts.username), unquote(parts.password or "")
    else:
        try:
            found = netrc.netrc(os.environ.get("NETRC")).authenticators(parts.hostname or "")
        except (OSError, netrc.NetrcParseError):
            return {}
        if found is None:
            return {}
        user, password = found[0], found[2] or ""
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode("ascii")}


def _s3_store(bucket: str, path: str) -> S3Store:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config: Any = {"checksum_algorithm": "SHA256", **_profile()}
    if endpoint:
        config["endpoint"] = endpoint
    if not os.environ.get("AWS_REGION"):
        config["region"] = os.environ.get("AWS_DEFAULT_REGION") or config.get("region") or "us-east-1"
    return S3Store(bucket, prefix=path.strip("/") or None, config=config, **_options({}))


def _profile() -> dict[str, str]:
    """Return keys and region of the AWS profile in use, where the environment gives none: obstore reads no files."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    home, profile = Path.home() / ".aws", os.environ.get("AWS_PROFILE") or "default"
    files = [
        os.environ.get("AWS_CONFIG_FILE") or home / "config",
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials",
    ]
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(files)
    except (configparser.Error, UnicodeDecodeError) as error:
        raise UsageError(
            f"{files[1]}: not a file of AWS profiles; mend it, or set AWS_ACCESS_KEY_ID"
        ) from error
    names = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
        "region": "region",
    }
    out: dict[str, str] = {}
    for section in (f"profile {profile}", profile):
        if parser.has_section(section):
            out |= {
                ours: parser[section][theirs] for theirs, ours in names.items() if theirs in parser[section]
            }
    return out
