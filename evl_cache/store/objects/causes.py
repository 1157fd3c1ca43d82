"""What errors of urllib3, and those of the system that they are made of, tell of a request."""

import errno
import http.client
import socket
import ssl
from typing import Any

import urllib3.exceptions as wrong

from evl_cache.store.objects.troubles import Trouble, status_trouble

_SHOWN_CHARACTERS = 200


def error_trouble(error: BaseException, *, host: str, proxy: str | None) -> Trouble:
    """Return what an error of urllib3, or one that it was made of, tells of a request to a host.

    Args:
        proxy: through which it went, as it may be shown.
    """
    if isinstance(error, wrong.ProxyError) or "Tunnel connection failed" in str(error):
        return _proxy_trouble(error, host, proxy)
    if isinstance(error, wrong.SSLError | ssl.SSLError):
        return _tls_trouble(error, host)
    if isinstance(error, wrong.NameResolutionError | socket.gaierror):
        return Trouble(
            f"the name {host} is not known (DNS)", "check the host's name, and the network", may_pass=True
        )
    if isinstance(error, wrong.NewConnectionError):  # one of the next kind, too
        return _connect_trouble(error.__cause__ or error, host)
    if isinstance(error, wrong.ConnectTimeoutError):
        return Trouble(
            f"{host} does not answer",
            "check the address, the network (VPN, firewall), and that the server is up",
            may_pass=True,
        )
    if isinstance(error, wrong.ReadTimeoutError | TimeoutError):
        return Trouble.broken("the server stopped answering")
    if isinstance(error, wrong.LocationParseError | wrong.LocationValueError):
        return Trouble("is no address", "check it: https://host/path")
    if isinstance(error, wrong.ProtocolError) and _is_no_http(error):
        return Trouble(
            "does not speak HTTP",
            "check the address and the port; is it https://, or another service?",
            may_pass=True,  # one answer may be garbled
        )
    if isinstance(error, wrong.HTTPError | OSError):
        return Trouble.broken()
    return Trouble.broken(f"the request failed ({_short(error)})")


def _is_no_http(error: wrong.ProtocolError) -> bool:
    """Whether what came begins as no answer of HTTP does; one that broke off in its first line begins so."""
    lines = [str(inner.args[0]) for inner in error.args if type(inner) is http.client.BadStatusLine]
    return any(not (line.startswith("HTTP/") or "HTTP/".startswith(line)) for line in lines)


def _connect_trouble(cause: BaseException, host: str) -> Trouble:
    number = getattr(cause, "errno", None)
    if number == errno.ECONNREFUSED:
        return Trouble(
            "nothing listens there (connection refused)",
            "check the address and the port, and that the server is up",
            may_pass=True,
        )
    what = (getattr(cause, "strerror", None) or _short(cause)).lower()
    passes = number not in {errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM}
    remedy = "check the address and the network"
    if not passes:
        remedy = (
            "raise the limit of open files (ulimit -n)" if number in {errno.EMFILE, errno.ENFILE} else remedy
        )
    return Trouble(f"{host} cannot be reached ({what})", remedy, may_pass=passes)


def _tls_trouble(error: BaseException, host: str) -> Trouble:
    inner: Any = error.args[0] if error.args else error
    text = str(error)
    if isinstance(inner, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in text:
        why = str(getattr(inner, "verify_message", "") or _short(inner))
        if "mismatch" in why.lower() or "doesn't match" in why.lower():
            remedy = "use the name that the certificate is for"
        elif "expired" in why or "not yet valid" in why:
            remedy = "check this computer's clock, or ask who keeps the server to renew it"
        else:
            remedy = "if it is of your lab, name its certificate: SSL_CERT_FILE=FILE.pem"
        return Trouble(f"the certificate of {host} is not accepted ({why.rstrip('.')})", remedy)
    if any(sign in text for sign in ("WRONG_VERSION_NUMBER", "record layer failure", "HTTP_REQUEST")):
        return Trouble(f"{host} does not speak TLS at this port", "use http://, or the port of https")
    if "EOF" in text:
        return Trouble.broken()
    return Trouble(
        f"no TLS connection to {host} ({_short(inner)})", "check the address and the port", may_pass=True
    )


def _proxy_trouble(error: BaseException, host: str, proxy: str | None) -> Trouble:
    name = f"the proxy {proxy}" if proxy else "the proxy"
    if "407" in str(error):
        return status_trouble(407, {})
    original = getattr(error, "original_error", None) or error
    cause = original.__cause__ or original
    what = getattr(cause, "strerror", None) or _short(cause)
    return Trouble(
        f"{name} fails ({what})",
        f"check HTTP_PROXY and HTTPS_PROXY, or reach the server without it: NO_PROXY={host}",
        may_pass=True,
    )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:_SHOWN_CHARACTERS] or type(error).__name__
