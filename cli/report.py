"""`evl-cache report`."""

from pathlib import Path

import click

from .common import Command, print_json, say

EXAMPLES = """
evl-cache report runs/fold1
evl-cache report runs/ablation --out ablation
evl-cache report runs/decoder4 runs/linear --out comparison
"""


@click.command(cls=Command, name="report", examples=EXAMPLES)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN…")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write [report/ in the first RUN].")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> int:
    """One page of runs and sweeps: curves, ablation, confusion, bytes and seconds, wrongest clips.

    report.html needs nothing beside it and fetches nothing; each plot lies beside it as a PNG. RUN is a directory that
    train or sweep wrote. Needs matplotlib: pip install 'evl-cache[report]'.
    """
    from evl_cache.report.data import gather, group_json
    from evl_cache.report.page import write_report_page

    data = gather(runs)
    report = write_report_page(data, out or runs[0] / "report")
    if as_json:
        print_json(
            {
                "page": str(report.page),
                "pictures": [str(path) for path in report.pictures],
                "groups": [group_json(group) for group in data.groups],
            }
        )
    else:
        say(f"{report.page}: open it in a browser; {len(report.pictures)} pictures beside it")
    return 0
