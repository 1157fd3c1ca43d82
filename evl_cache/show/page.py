"""Write a page of pictures of a run's worst mistakes and surest hits."""

import html
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from evl_cache.errors import UsageError
from evl_cache.notation import escaped
from evl_cache.precision import precision_of_run
from evl_cache.runs import (
    Scores,
    classes_of_run,
    clips_of_run,
    count_trained_on,
    recorded_cache,
    run_loader,
    score,
    spread_text,
    wilson_interval,
    write_text,
)
from evl_cache.show.view import ShowRun, decoder_of, draw_cached
from evl_cache.store import FeatureCache, Indices
from evl_cache.video import DecodeOptions
from evl_cache.video.pool import DEFAULT_TIMEOUT_S

PAGE_NAME = "index.html"
_NOTE = "Scores are means over a clip's views; the pictures show its first view."
_BY_NUMBER = "Classes are compared by number, as only one of the head and the cache has names of them."


def show_page(
    run: ShowRun,
    cache: FeatureCache,
    folder: str | Path,
    *,
    each: int = 6,
    clips: Indices | None = None,
    device: str = "cpu",
    decoding: DecodeOptions | None = None,
    clip_timeout_s: float = DEFAULT_TIMEOUT_S,
    on_picture: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a page of the clips that the run gets most wrong and of those it gets right most surely, and return its path.

    Args:
        run: whose head is shown.
        cache: of clips with labels.
        folder: where the page and its pictures are written; it is made.
        each: number of clips of either kind.
        clips: rows of the clip list, one or several, a slice, or a mask of all clips; all by default.
        device: where clips are scored, in the precision of the run's training where the device has it.
        decoding: as `show_cached` takes it.
        clip_timeout_s: longest time for decoding one video.
        on_picture: called after each picture, with the number of pictures done and of all.

    Raises: as `evaluate` and `show_cached` do; UsageError where files of others would be written over.
    """
    folder = Path(folder)
    _check_place(folder, each)
    head = run.head.to(device)
    loader = run_loader(run.path, run.config, head, cache, clips=clips)
    precision = precision_of_run(run.config.training, device)
    scores = score(head, loader, device=torch.device(device), precision=precision)
    head.cpu()
    wrong, right = wrongest_and_surest(scores, each)
    folder.mkdir(parents=True, exist_ok=True)
    sections: list[tuple[str, list[tuple[str, str, str]]]] = []
    with decoder_of(cache.spec, decoding, clip_timeout_s) as decode:
        for name, places in (("wrongest", wrong), ("surest", right)):
            rows = []
            for number, place in enumerate(places, 1):
                picture = folder / f"{name}-{number:02d}.png"
                clip = cache.clips[int(scores.clips[place])]
                draw_cached(cache, clip.id, picture, run=run, decode=decode)
                rows.append((picture.name, escaped(clip.id), _verdict(scores, place, run.config.classes)))
                on_picture(len(sections) * each + number, len(wrong) + len(right))
            sections.append((name, rows))
    page = folder / PAGE_NAME
    whose = _whose_clips(run, cache, scores, loader.samples)
    by_number = classes_of_run(run.path, run.config, cache).by_number
    write_text(page, _page(run.path, cache, scores, sections, whose=whose, by_number=by_number))
    return page


def _check_place(folder: Path, each: int) -> None:
    """Check that files of a page are written over where they are a page's. Raises: UsageError."""
    names = (f"{kind}-{number:02d}.png" for kind in ("wrongest", "surest") for number in range(1, each + 1))
    taken = [name for name in (PAGE_NAME, *names) if (folder / name).exists()]
    page = folder / PAGE_NAME
    is_ours = page.is_file() and _NOTE in page.read_text(encoding="utf-8", errors="replace")
    if taken and not is_ours:
        raise UsageError(
            f"{folder / taken[0]} is there, and is no file of such a page; choose another --page"
        )


def wrongest_and_surest(scores: Scores, each: int) -> tuple[list[int], list[int]]:
    """Return places in `scores`: mistakes, least probable label first, and hits, most probable label first."""
    of_label = scores.probabilities[np.arange(len(scores.labels)), scores.labels]
    is_right = scores.probabilities.argmax(axis=1) == scores.labels
    order = np.argsort(of_label, kind="stable")
    wrong = [int(i) for i in order if not is_right[i]][:each]
    order = np.argsort(-of_label, kind="stable")
    return wrong, [int(i) for i in order if is_right[i]][:each]


def _whose_clips(run: ShowRun, cache: FeatureCache, scores: Scores, samples: np.ndarray) -> str:
    """Return, for the sentence that counts the clips, what the run knows of them."""
    if not run.config.caches:  # an imported head, which was validated nowhere
        return ""
    if clips_of_run(run.config, fingerprint=cache.fingerprint, samples=samples) == "validation":
        return " that the run was validated on"
    trained = count_trained_on(run.config, cache, scores.clips.tolist())
    told = f", {trained} of which the run was trained on" if trained else ""
    return f" (not the clips that the run was validated on{told})"


def _verdict(scores: Scores, place: int, classes: Sequence[str]) -> str:
    row, label = scores.probabilities[place], int(scores.labels[place])
    said = int(row.argmax())
    if said == label:
        return f"{classes[label]}, found with {100 * row[label]:.1f} %"
    return f"{classes[label]} ({100 * row[label]:.1f} %), taken for {classes[said]} ({100 * row[said]:.1f} %)"


def _page(
    run: Path,
    cache: FeatureCache,
    scores: Scores,
    sections: Sequence[tuple[str, Sequence[tuple[str, str, str]]]],
    *,
    whose: str,
    by_number: bool,
) -> str:
    note = f"{_NOTE} {_BY_NUMBER}" if by_number else _NOTE
    interval = spread_text(None, wilson_interval(scores.top(1), len(scores.labels)))
    heading = {"wrongest": "Mistakes, the least probable label first", "surest": "Found, the surest first"}
    out = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(str(run))}</title>",
        (
            "<style>body{font:16px/1.4 system-ui,sans-serif;margin:2rem auto;max-width:1500px;color:#222}"
            "img{max-width:100%;border:1px solid #ccc}h3{margin:1.6rem 0 .3rem}code{background:#eee}</style>"
        ),
        f"<h1>Clips of {html.escape(run.name)}</h1>",
        (
            f"<p>{len(scores.labels)} clips of <code>{html.escape(cache.name)}</code>{whose}, "
            f"tower {html.escape(cache.spec.tower.model)}, top-1 {scores.top(1):.1f} %{interval}. "
            f"{note}</p>"
        ),
    ]
    for name, rows in sections:
        out.append(f"<h2>{heading[name]}</h2>")
        if not rows:
            out.append("<p>None.</p>")
        for picture, clip, verdict in rows:
            out.append(f"<h3>{html.escape(clip)}</h3><p>{html.escape(verdict)}</p>")
            out.append(f'<img src="{html.escape(picture)}" alt="{html.escape(f"{clip}: {verdict}")}">')
    return "\n".join(out) + "\n"


def cache_of_run(run: ShowRun) -> FeatureCache:
    """Open the validation cache that the run names, a directory or a URL. Raises: as `recorded_cache`."""
    return recorded_cache(run.path, run.config, "val")
