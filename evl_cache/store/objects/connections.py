"""Connections to HTTP servers: kept open in each process, directly or through proxies, with certificates proved."""

import os
import ssl
import urllib.request
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import certifi
import urllib3

from evl_cache.errors import UsageError
from evl_cache.store.objects.address import public_text
from evl_cache.store.objects.logins import login_of

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 30.0
_SERVERS, _CONNECTIONS = 16, 64  # connections to a server that are kept open, of so many servers
_clients: dict[tuple[int, str | None, str | None, bool], urllib3.PoolManager] = {}


def client(url: str, proxy: str | None) -> urllib3.PoolManager:
    """Return what asks for an address, directly or through a proxy.

    All of a process share it, and so its connections; a forked process makes its own.
    """
    is_tls = url.lower().startswith("https:")
    key = (os.getpid(), proxy, os.environ.get("SSL_CERT_FILE") if is_tls else None, is_tls)
    if (found := _clients.get(key)) is None:
        options: dict[str, Any] = {
            "num_pools": _SERVERS,
            "maxsize": _CONNECTIONS,
            "retries": False,
            "timeout": urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S),
            "ssl_context": tls_context() if is_tls else None,
        }
        made = urllib3.PoolManager(**options) if proxy is None else _through(proxy, options)
        found = _clients.setdefault(key, made)
    return found


def tls_context(variable: str = "SSL_CERT_FILE") -> ssl.SSLContext:
    """Return what proves servers' certificates: by the system's, or those that a variable names.

    Raises: UsageError where that is no file of certificates.
    """
    if named := os.environ.get(variable):
        try:
            return ssl.create_default_context(cafile=named)
        except (ssl.SSLError, OSError) as error:
            why = "holds no certificate in PEM" if isinstance(error, ssl.SSLError) else f"{error.strerror}"
            raise UsageError(
                f"{variable} is {named}: {why}; name a file of certificates, or unset it"
            ) from error
    context, known = ssl.create_default_context(), ssl.get_default_verify_paths()
    if not any((known.cafile, known.capath)):  # a Python that does not know the system's
        context.load_verify_locations(certifi.where())
    return context


def proxy_for(url: str) -> str | None:
    """Return the proxy that the environment names for an address; looked for once, as that takes as long as a request."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    found = urllib.request.getproxies()
    proxy = found.get(parts.scheme) or found.get("all")
    if not proxy:
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        named = urlsplit(proxy)
        is_address = named.scheme in ("http", "https") and bool(named.hostname) and named.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise UsageError(
            f"the proxy {public_text(proxy)} is no address; expected http://host:port in HTTP_PROXY and HTTPS_PROXY"
        )
    return proxy


def _through(proxy: str, options: dict[str, Any]) -> urllib3.PoolManager:
    parts, headers = urlsplit(proxy), None
    if parts.username is not None:
        headers = {"Proxy-Authorization": login_of(parts).header or ""}
    address = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], "", "", ""))
    return urllib3.ProxyManager(address, proxy_headers=headers, **options)
