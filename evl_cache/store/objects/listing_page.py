"""The page on which an HTTP server lists a folder."""

from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlsplit

from evl_cache.store.objects.logins import origin


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.wants_password = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "a" and (link := named.get("href")):
            self.found.append(link)
        self.wants_password |= tag == "input" and (named.get("type") or "").lower() == "password"


def is_web_page(content: bytes) -> bool:
    """Whether the beginning of a file is a page for people."""
    return content[:1024].lstrip().lower().startswith((b"<!doctype html", b"<html", b"<head"))


def listed_folders(page: bytes, address: str) -> list[str] | None:
    """Return the names of the folders directly below an address that its page links to, sorted.

    Args:
        address: of the page, where it was found at last.

    Returns: None where the page asks for a password instead.
    """
    links = _Links()
    links.feed(page.decode("utf-8", "replace"))
    base = urlsplit(address if address.endswith("/") else f"{address}/")
    if links.wants_password:
        return None
    return sorted({name for link in links.found if (name := _folder(link, base.geturl()))})


def _folder(link: str, base: str) -> str | None:
    """Return the name of the folder directly below that a link leads to, or None."""
    try:
        target, here = urlsplit(urljoin(base, link.strip())), urlsplit(base)
        if origin(target.geturl()) != origin(base):
            return None
    except ValueError:
        return None
    path, root = unquote(target.path), unquote(here.path)
    if target.query or not path.startswith(root) or not path.endswith("/"):
        return None
    name = path[len(root) : -1]
    return None if "/" in name or "\0" in name or name in ("", ".", "..") else name
