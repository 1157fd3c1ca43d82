"""What a finished run says class by class: a confusion matrix and a table."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evl_cache.clips import Clip
from evl_cache.runs.directory import RunFile
from evl_cache.runs.scoring import ClassScore, Scores
from evl_cache.runs.whole_files import write_json, write_text


def write_report(run: Path, scores: Scores, classes: Sequence[str], clips: Sequence[Clip]) -> None:
    """Write `confusion.csv`, `classes.json` and `scored.csv`.

    The confusion matrix has a row for each true class and a column for each class said, in clips. `scored.csv` has
    a row for each clip: what it is, what the head said, and the probability of both.

    Args:
        clips: all of the cache.
    """
    counts = zip(classes, scores.confusion().tolist(), strict=True)
    _write_csv(run / RunFile.CONFUSION, [["class", *classes], *([name, *row] for name, row in counts)])
    write_json(run / RunFile.CLASSES, {"classes": [asdict(row) for row in scores.by_class(classes)]})
    rows: list[list[Any]] = [["clip", "class", "said", "p_class", "p_said"]]
    said = scores.probabilities.argmax(axis=1)
    for row, label, other, p in zip(scores.clips, scores.labels, said, scores.probabilities, strict=True):
        names = clips[row].id, classes[label], classes[other]
        rows.append([*names, f"{p[label]:.6f}", f"{p[other]:.6f}"])
    _write_csv(run / RunFile.SCORED, rows)


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    lines = io.StringIO(newline="")
    csv.writer(lines).writerows(rows)
    write_text(path, lines.getvalue())


def worst_classes(run: Path, count: int = 5) -> list[ClassScore]:
    """The classes of a finished run with the lowest top-1, worst first; of equals the larger, then by name."""
    rows = json.loads((run / RunFile.CLASSES).read_text(encoding="utf-8"))["classes"]
    scores = [ClassScore(**row) for row in rows]
    return sorted(scores, key=lambda row: (row.top1, -row.clips, row.name))[:count]
