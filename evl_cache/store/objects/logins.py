"""Who one is at an HTTP server: user and password, for the host that they were given for and no other."""

import base64
import netrc
import os
from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit

_DEFAULT_PORTS = {"http": 80, "https": 443}
_PUT_IT = "put user and password for the host into ~/.netrc"


@dataclass(frozen=True)
class Login:
    """What a server is told of who asks.

    Attributes:
        header: the value of Authorization; None for nobody.
        remedy: what to do where the server wants another.
    """

    header: str | None = field(repr=False)
    remedy: str


def login_of(url: SplitResult) -> Login:
    """Return the login that an address itself gives, or ~/.netrc (or the file that NETRC names) for its host."""
    if url.username is not None:
        user, password = unquote(url.username), unquote(url.password or "")
        return Login(_basic(user, password), "the server refuses the user and password of the address")
    named = os.environ.get("NETRC")
    shown = named or "~/.netrc"
    try:
        machines = {name.lower(): login for name, login in netrc.netrc(named).hosts.items()}
    except FileNotFoundError:
        return Login(None, _PUT_IT)
    except OSError as error:
        return Login(None, f"{shown} cannot be read ({error.strerror}): mend that, or {_PUT_IT}")
    except UnicodeDecodeError:
        return Login(None, f"{shown} is no text, so it is not used; mend it")
    except netrc.NetrcParseError as error:
        # Its message may quote a password.
        if error.lineno is None and "owner (" in error.msg:
            return Login(None, f"{shown} belongs to another user, so it is not used; make it your own")
        if error.lineno is None:
            return Login(None, f"{shown} may be read by others, so it is not used; chmod 600 {shown}")
        return Login(None, f"{shown} has a mistake in line {error.lineno}, so it is not used; mend it")
    found = machines.get(url.hostname or "")
    if found is None and "default" in machines:  # given for no host: any stranger's would be told
        return Login(None, f"{_PUT_IT.replace('~/.netrc', shown)}: its entry default is not used")
    if found is None:
        return Login(None, _PUT_IT if named is None else f"put user and password for the host into {shown}")
    return Login(_basic(found[0], found[2] or ""), f"the server refuses the user and password of {shown}")


def is_given_for(url: str, other: str) -> bool:
    """Whether a login for one address may be told to another: one server, or the same name by TLS at the usual ports."""
    mine, theirs = origin(url), origin(other)
    is_upgrade = mine[0] == "http" and theirs[0] == "https" and (mine[2], theirs[2]) == (80, 443)
    return mine == theirs or (is_upgrade and mine[1] == theirs[1])


def origin(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port of a URL, written in one way. Raises: ValueError."""
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    return scheme, (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS.get(scheme, 0)


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode("ascii")
