"""Every password and key of the tests: strings that occur nowhere else, so that one in a wrong place is found."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

USER, PASSWORD = "lab", "pa-ss-4d5e6f"
OTHER_USER, OTHER_PASSWORD = "neighbour", "pw-other-7g8h9i"  # of another host
PROXY_USER, PROXY_PASSWORD = "porter", "pw-proxy-0j1k2l"
KEY_ID, SECRET_KEY = "test-key", "test-secret-1a2b3c"  # of S3
COOKIE = "session-3m4n5o"

# A user's name and the identity of a key may be seen; these may not.
SECRETS = (PASSWORD, OTHER_PASSWORD, PROXY_PASSWORD, SECRET_KEY, COOKIE)
_USERS = ((USER, PASSWORD), (OTHER_USER, OTHER_PASSWORD), (PROXY_USER, PROXY_PASSWORD))
# Files in which tests wrote secrets themselves, and folders of servers that are told them.
_declared: set[Path] = set()


def basic(user: str, password: str) -> str:
    """The words of HTTP's Basic login."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def forms() -> Iterator[tuple[str, str]]:
    """(secret, as it might be written): as it is, in a URL, in a login."""
    for secret in SECRETS:
        yield secret, secret
        if quote(secret, safe="") != secret:
            yield secret, quote(secret, safe="")
    for user, password in _USERS:
        yield password, basic(user, password)


def secrets_in(text: str) -> set[str]:
    """The secrets that a text holds in some form."""
    return {secret for secret, form in forms() if form in text}


def write_secret(path: Path, text: str, *, mode: int = 0o600) -> Path:
    """Write a file that may hold secrets, as a user's netrc does."""
    declare(path)
    path.write_text(text)
    path.chmod(mode)
    return path


def declare(path: Path) -> Path:
    """From now on a file, or a folder with all that it holds, may have secrets in it: who set it up put them there."""
    _declared.add(path.absolute())
    return path


def is_declared(path: Path) -> bool:
    return not _declared.isdisjoint((path, *path.parents))


@contextmanager
def nothing_declared() -> Iterator[None]:
    """For tests of the search itself."""
    before = set(_declared)
    _declared.clear()
    try:
        yield
    finally:
        _declared.update(before)
