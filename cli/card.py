"""`evl-cache card`."""

import click

from .common import Command, shown

EXAMPLES = """
evl-cache card caches/mine --license cc-by-4.0
evl-cache card caches/mine --print --address https://example.org/caches/mine
"""


@click.command(cls=Command, name="card", examples=EXAMPLES)
@click.argument("cache")
@click.option(
    "--license",
    "license_name",
    default="unknown",
    show_default=True,
    help="As data hubs name it: cc-by-4.0, other.",
)
@click.option("--address", metavar="URL", help="Where others will find the cache: its examples then name it.")
@click.option("--replace", "replace_card", is_flag=True, help="Write it although another README.md is there.")
@click.option("--print", "printed", is_flag=True, help="Print it; write nothing.")
def command(cache: str, license_name: str, address: str | None, replace_card: bool, printed: bool) -> int:
    """Write the README.md of a complete cache as data hubs expect it.

    What it holds, how it was made, size and digests, licence, how to use it, citation. push and pull take it along.
    """
    from evl_cache.caches.card import cache_card, make_card
    from evl_cache.store import FeatureCache

    if printed:
        text = cache_card(FeatureCache(cache), license_name=license_name, address=address)
        for line in text.splitlines():
            click.echo(shown(line))
        return 0
    file = make_card(cache, license_name=license_name, address=address, replace_card=replace_card)
    click.echo(f"{file}: fill in what only you know, then push")
    return 0
