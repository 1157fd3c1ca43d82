"""Write a report of runs and sweeps: one page that needs no other file, and its plots as PNG files."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evl_cache.errors import UsageError
from evl_cache.report.data import Group, ReportData, RunAccount
from evl_cache.report.plots import CURVES, as_bytes, draw_plots, lettering_of
from evl_cache.runs import is_online, spread_text, whole_file, write_text

PAGE_NAME = "report.html"
WRONGEST = 12

# The page may fetch nothing, as all it shows is in it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light; --ink: #1a1a1a; --soft: #5a5a5a; --line: #d8d8d8; --bar: #0072B2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: #fff;
  font: 16px/1.45 system-ui, "Segoe UI", "DejaVu Sans", Arial, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: .4rem 0 1rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .7rem; }
.card b { display: block; font-size: 1.25rem; } .card span { color: var(--soft); font-size: .85rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; align-items: start; }
figure { margin: 0; } figure img { width: 100%; max-width: 36rem; height: auto; display: block; }
.rows { border-top: 1px solid var(--line); }
.row { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: .1rem .8rem; padding: .5rem 0;
  border-bottom: 1px solid var(--line); align-items: center; }
.row span { min-width: 0; overflow-wrap: anywhere; }
.row .value { font-variant-numeric: tabular-nums; white-space: nowrap; text-align: right; }
.row .bar, .row .more { grid-column: 1 / -1; } .row .more { color: var(--soft); font-size: .85rem; }
.bar { position: relative; height: .7rem; background: #eee; }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--bar); }
.bar u { position: absolute; top: 50%; height: 2px; margin-top: -1px; background: #000;
  border-left: 2px solid #000; border-right: 2px solid #000; }
@media (min-width: 48rem) {
  .ablation .row { grid-template-columns: 16rem minmax(0, 1fr) 8.5rem 19rem; }
  .ablation .row .bar, .ablation .row .more { grid-column: auto; } .ablation .row .value { order: 3; }
  .ablation .row .bar { order: 2; } .ablation .row .more { order: 4; text-align: right; }
}
"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The files of a report.

    Attributes:
        page: the HTML page.
        pictures: a PNG file of each plot.
    """

    page: Path
    pictures: tuple[Path, ...]


def write_report_page(data: ReportData, out: str | Path) -> Report:
    """Write `report.html` and the PNG files into a directory, which is made.

    Raises: UsageError without matplotlib, or where files of others would be written over.
    """
    plots, out = draw_plots(data), Path(out)
    _check_place(out, [PAGE_NAME, *(f"{name}.png" for name in plots)])
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, figure in plots.items():
        path = out / f"{name}.png"
        with whole_file(path) as staging:
            staging.write_bytes(as_bytes(figure, "png"))
        pictures.append(path)
    images = {name: as_bytes(figure, "svg") for name, figure in plots.items()}
    page = out / PAGE_NAME
    write_text(page, render(data, images))
    return Report(page=page, pictures=tuple(pictures))


def _check_place(out: Path, names: Sequence[str]) -> None:
    """Check that files of a report are written over where they are a report's. Raises: UsageError."""
    page, taken = out / PAGE_NAME, [name for name in names if (out / name).exists()]
    is_report = page.is_file() and _POLICY in page.read_text(encoding="utf-8", errors="replace")
    if taken and not is_report:
        raise UsageError(f"{out / taken[0]} is there, and is no file of a report; choose another --out")


def render(data: ReportData, images: Mapping[str, bytes]) -> str:
    """Return the whole page; `images` are SVG by the plot's name."""
    best = data.best
    parts = [
        f"<h1>{_text(data.title)}</h1>",
        _cards(data),
        "<h2>Learning curves</h2>",
        '<p class="soft">Means over seeds; bands from the smallest to the largest.</p>'
        if _has_seeds(data)
        else "",
        _plots(images, {f"curve-{name}": text for name, text in CURVES.items()}),
        _ablation(data) if len(data.groups) > 1 else "",
        _unfinished(data),
        f"<h2>Confusion of {_text(best.label)}</h2>",
        '<p class="soft">Rows: the class; columns: the class said; numbers: clips; colour: share of the row.</p>',
        _plots(images, {"confusion": "confusion matrix"}),
        _numbers(data),
        _cost(data),
        _wrongest(best),
    ]
    body = "\n".join(part for part in parts if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{_text(data.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _numbers(data: ReportData) -> str:
    """Return what the numbers in the confusion matrix stand for, where no font draws a name; browsers have more fonts."""
    classes = data.best.config.classes
    named = ", ".join(
        f"#{number} {_text(classes[number])}" for number in lettering_of(data).numbered(classes)
    )
    return f'<p class="soft">Classes by number: {named}.</p>' if named else ""


def _cards(data: ReportData) -> str:
    best, group = data.best, data.groups[0]
    cards = [
        (f"{group.top1:.1f}{spread_text(group.deviation, group.interval)} %", f"top-1, {group.name}"),
        (f"{best.result['top5']:.1f} %", f"top-5, {best.label}"),
        (str(best.result["val_clips"]), f"validation clips of {len(best.config.classes)} classes"),
        (str(len(data.runs)), f"runs in {len(data.groups)} groups"),
        (str(best.result["epochs"]), f"epochs, {best.result['steps']} steps"),
    ]
    inside = "".join(f'<div class="card"><b>{_text(b)}</b><span>{_text(t)}</span></div>' for b, t in cards)
    return f'<div class="cards">{inside}</div>'


def _ablation(data: ReportData) -> str:
    rows = "".join(_ablation_row(group) for group in data.groups)
    note = (
        "Bars: top-1 from 0 to 100 %, mean over seeds; whiskers: standard deviation of the seeds, or of one run the 95 % "
        "interval over its validation clips (Wilson)."
    )
    if data.is_of_several_clip_sets:
        note += " Rows were scored on different clips: their accuracies do not compare."
    return f'<h2>Ablation</h2><p class="soft">{note}</p><div class="rows ablation" role="table">{rows}</div>'


def _ablation_row(group: Group) -> str:
    value = f"{group.top1:.1f}{spread_text(group.deviation, group.interval)}"
    left, right = group.whisker
    whisker = f'<u style="left:{left:.2f}%;width:{right - left:.2f}%"></u>'
    result = group.runs[0].result
    details = [f"{len(group.runs)} seeds" if len(group.runs) > 1 else "1 run"]
    if "parameters" in result:
        details.append(f"{_count(result['parameters'])} parameters")
        details.append(f"{result['ms_per_step']:.0f} ms a step")
    if group.told and group.told not in group.name:
        details.append(group.told)
    return (
        f'<div class="row" role="row"><span role="cell">{_text(group.name)}</span>'
        f'<span class="value" role="cell">{value} %</span>'
        f'<span class="bar" role="cell"><i style="width:{group.top1:.2f}%"></i>{whisker}</span>'
        f'<span class="more" role="cell">{_text(", ".join(details))}</span></div>'
    )


def _unfinished(data: ReportData) -> str:
    if not data.unfinished:
        return ""
    rows = "".join(f"<p><b>{_text(name)}</b>: {_text(why)}</p>" for name, why in data.unfinished)
    return f"<h2>Without a result</h2>{rows}"


def _cost(data: ReportData) -> str:
    rows = []
    for group in data.groups:
        run = group.runs[0]
        read, steps, result = run.bytes_read, run.step_seconds, run.result
        unread = "no cache read" if is_online(run.config) else "not recorded"
        value = unread if read is None else f"{_bytes(read)} read"
        value += "" if steps is None else f", {steps:.1f} s of steps"
        more = f"{result['clips_per_s']:.0f} clips/s in steps, batch {result['batch']}; {result['seconds']:.1f} s in all"
        if read is not None:
            more += f"; {_bytes(run.config.caches['train']['sample_nbytes'])} a sample"
        rows.append(
            f'<div class="row"><span>{_text(group.name)}</span><span class="more">{value}; {more}</span></div>'
        )
    note = (
        "Of one run each: what it would read by itself (decompressed; samples kept in memory count in each epoch), its "
        "steps, and the whole run or pass of a sweep."
    )
    return f'<h2>Bytes and seconds</h2><p class="soft">{note}</p><div class="rows">{"".join(rows)}</div>'


def _wrongest(run: RunAccount) -> str:
    clips = run.wrongest(WRONGEST)
    if not clips:
        return ""
    rows = "".join(
        f'<div class="row"><span>{_text(c.clip)}</span><span class="value">{100 * c.p_said:.0f} %</span>'
        f'<span class="more">is {_text(c.label)} ({100 * c.p_label:.0f} %), said {_text(c.said)}</span></div>'
        for c in clips
    )
    wrong = sum(clip.label != clip.said for clip in run.scored)
    note = (
        f"The surest of {wrong} mistakes in {len(run.scored)} clips, with the probability of what was said."
    )
    return f'<h2>Wrongest clips of {_text(run.label)}</h2><p class="soft">{note}</p><div class="rows">{rows}</div>'


def _plots(images: Mapping[str, bytes], wanted: Mapping[str, str]) -> str:
    """Return the HTML of some plots; `wanted` says what each shows, by its name."""
    figures = [
        f'<figure><img alt="{_text(text)}" src="data:image/svg+xml;base64,{base64.b64encode(images[name]).decode()}">'
        "</figure>"
        for name, text in wanted.items()
    ]
    return f'<div class="plots">{"".join(figures)}</div>'


def _has_seeds(data: ReportData) -> bool:
    return any(len(group.runs) > 1 for group in data.groups)


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.1f} k"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
