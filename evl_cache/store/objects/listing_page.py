"""The page on which an HTTP server lists a folder."""

from dataclasses import dataclass
from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlsplit

from evl_cache.store.objects.logins import origin


@dataclass(frozen=True)
class Listing:
    """What a page tells of a folder.

    Attributes:
        folders: names of the folders directly below that it links to, sorted.
        wants_password: whether it asks for one, and is no listing.
        needs_script: whether it links to nothing and holds a script, which may list the folder in a browser.
    """

    folders: list[str]
    wants_password: bool
    needs_script: bool


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.wants_password = self.has_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "a" and (link := named.get("href")):
            self.found.append(link)
        self.has_script |= tag == "script"
        self.wants_password |= tag == "input" and (named.get("type") or "").lower() == "password"


def is_web_page(content: bytes) -> bool:
    """Whether the beginning of a file is a page for people."""
    return content[:1024].lstrip().lower().startswith((b"<!doctype html", b"<html", b"<head"))


def read_listing(page: bytes, address: str) -> Listing:
    """Return what the page of an address tells of the folder.

    Args:
        address: of the page, where it was found at last.
    """
    links = _Links()
    links.feed(page.decode("utf-8", "replace"))
    base = urlsplit(address if address.endswith("/") else f"{address}/")
    folders = sorted({name for link in links.found if (name := _folder(link, base.geturl()))})
    return Listing(folders, links.wants_password, needs_script=links.has_script and not links.found)


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
