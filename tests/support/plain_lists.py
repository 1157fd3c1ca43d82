"""Lists and tables of clips, drawn by seed and read the obvious way. Names of videos end in .mp4 once, here alone."""

import csv
import io
import json
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

KINDS = {
    "path": ("path", "File", "video_path", "filename", "CLIP"),
    "label": ("label", "class", "Category", "label name"),
    "split": ("split", "Subset"),
    "start": ("start", "time_start", "start_s"),
    "end": ("end", "stop", "END_TIME"),
    "start_frame": ("start_frame",),
    "end_frame": ("end_frame", "stop_frame"),
    "id": ("id", "clip-id"),
}
SPLITS = {
    "train": "train",
    "Training": "train",
    "val": "val",
    "dev": "val",
    "validation": "val",
    "test": "test",
}
VIDEOS = (
    "a.mp4",
    "b c.mp4",
    "d, e.mp4",
    "sub/ü.mp4",
    'q"q.mp4',
    "日本.MP4",
    "x;y.mp4",
    "#1.mp4",
    "{z}.mp4",
    "5.mp4",
)
NAMES = ("run", "play guitar", "eat, drink", "走る", "take 3", 'say "no"', "c#", "Run", "a_b", "🏃")
NUMBERS = ("0", "1", "2", "10", "1.0", "2.")
BAD_LABELS = ("-1", "-1.0", "1,3", "1|3", "[0, 2]", "", "100000", "run,play guitar")
SPANS = ("", "", "0", "1", "1.5", "2", "00:00:01.5", "1:02", "30.0")
BAD_SPANS = ("-1", "nan", "inf", "x", "1e999", "1,5", "00:61:00")


class Row(NamedTuple):
    """What one line says."""

    path: str
    label: str
    split: str | None = None
    segment: tuple[str, float, float | None] | None = None
    id: str | None = None


class Refused(Exception):
    """The obvious reader refuses."""


def refuse_if(wrong: object) -> None:
    if wrong:
        raise Refused


def draw_case(folder: Path, seed: int) -> Path:
    """Write some of the videos, and a list or table of them with whatever people do to one."""
    draw = random.Random(seed)
    for name in VIDEOS:
        if draw.random() < 0.99:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    labels = list(draw.sample(draw.choice((NAMES, NUMBERS)), 3))
    if draw.random() < 0.08:
        labels += [draw.choice((*BAD_LABELS, *NAMES, *NUMBERS))]
    form = draw.choice(("list", "table", "table", "json", "array"))
    videos = draw.sample(VIDEOS, draw.randint(1, 7))
    if draw.random() < 0.05:
        videos.append(draw.choice(videos))
    rows = [{"path": video, "label": draw.choice(labels)} for video in videos]
    text = _list(draw, rows) if form == "list" else _table(draw, rows, form)
    if draw.random() < 0.2 and form != "array":
        text = text.replace("\n", "\n\n", draw.randint(1, 2))
    if draw.random() < 0.3:
        text = text.replace("\n", "\r\n")
    if draw.random() < 0.04 and form != "array":
        text = text[: draw.randint(1, len(text))]
    path = folder / {"list": "l.txt", "table": "t.csv", "json": "j.jsonl", "array": "j.json"}[form]
    path.write_bytes((b"\xef\xbb\xbf" if draw.random() < 0.2 else b"") + text.encode())
    return path


def _list(draw: random.Random, rows: list[dict[str, str]]) -> str:
    mark = draw.choice((" ", "\t", ",", " , ", "  "))
    lines = []
    for row in rows:
        quoted = '"' + row["path"].replace('"', '""') + '"'
        path = quoted if mark != "\t" and draw.random() < 0.1 else row["path"]
        label = f'"{row["label"]}"' if "," in mark and "," in row["label"] else row["label"]
        lines.append(f"{path}{mark}{label}" + (",more" if draw.random() < 0.01 else ""))
    header = ["path\tlabel"] if mark == "\t" and draw.random() < 0.3 else []
    return "\n".join(header + lines) + draw.choice(("", "\n", "\n\n"))


def _table(draw: random.Random, rows: list[dict[str, str]], form: str) -> str:
    more = [kind for kind in ("split", "id") if draw.random() < 0.35]
    unit = draw.choice((["start", "end"], ["start_frame", "end_frame"], ["start"], ["end"]))
    more += unit if draw.random() < 0.4 else []
    more += ["end_frame"] if draw.random() < 0.02 else []
    columns = list(dict.fromkeys(["path", "label", *more]))
    if draw.random() < 0.02:
        columns.remove(draw.choice(columns[:2]))
    rows = rows + [dict(row) for row in rows if "start" in more and draw.random() < 0.3]
    for number, row in enumerate(rows):
        for kind in set(columns) - {"path", "label"}:
            spans = BAD_SPANS if draw.random() < 0.01 else SPANS
            row[kind] = draw.choice(spans if kind not in ("split", "id") else tuple(SPLITS))
        if "id" in columns:
            row["id"] = f"clip {number}" if draw.random() < 0.8 else ""
        if "split" in columns and draw.random() < 0.02:
            row["split"] = draw.choice(("", "fold1"))
    names = {kind: draw.choice(KINDS[kind]) for kind in columns}
    if draw.random() < 0.3:
        names["unknown"] = draw.choice(("fps", "splt", "lable", "note"))
    if draw.random() < 0.03:
        names["again"] = draw.choice(KINDS["label"])
    order = draw.sample(list(names), len(names))
    if form != "table":
        return _json(draw, rows, names, order, form)
    out = io.StringIO()
    quoting = draw.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    writer = csv.writer(out, delimiter=draw.choice(",;\t"), lineterminator="\n", quoting=quoting)
    writer.writerow([names[kind] for kind in order])
    for row in rows:
        cells = [row.get(kind, "x") for kind in order]
        writer.writerow(cells[:-1] if draw.random() < 0.01 else cells)
        if draw.random() < 0.03:
            out.write("# a note\n")
    return out.getvalue()


def _json(
    draw: random.Random, rows: list[dict[str, str]], names: dict[str, str], order: list[str], form: str
) -> str:
    lines = []
    for row in rows:
        value: dict[str, Any] = {names[kind]: row.get(kind, "x") for kind in order}
        for kind in KINDS.keys() - {"path", "split", "id"} & names.keys():
            if re.fullmatch(r"\d+(\.\d+)?", row.get(kind, "")) and draw.random() < 0.7:
                value[names[kind]] = json.loads(row[kind]) if kind != "label" else int(float(row[kind]))
            elif kind != "label" and row.get(kind) == "":
                value[names[kind]] = draw.choice(("", None))
        if draw.random() < 0.02 and "label" in names:
            value[names["label"]] = draw.choice(([1, 2], 1.5, True, None, {}, float("nan")))
        lines.append(json.dumps(value, ensure_ascii=draw.random() < 0.5))
    return "[" + ",\n".join(lines) + "]" if form == "array" else "\n".join(lines) + "\n"


def plain_read(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """(id, path, name of class, segment) of each clip by split. Raises: Refused."""
    text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    if path.suffix in (".jsonl", ".json"):
        rows = _read_json(text, path.suffix == ".json")
    else:
        rows = _read_csv(text) if path.suffix == ".csv" else _read_list(text)
    labelled = {row.split for row in rows if not re.fullmatch(r"(-\d.*)?", row.label)}
    if "train" in {row.split for row in rows} and "val" not in {row.split for row in rows}:
        rows = [row for row in rows if row.split != "test" or "test" in labelled]
    rows = [row for row in rows if row.split in _wanted(rows) or not re.fullmatch(r"(-\d.*)?", row.label)]
    refuse_if(not rows)
    names = _classes([row.label for row in rows])
    ids = [row.id or row.path + _told(row.segment) for row in rows]
    parts = [
        (row.path, None if row.segment and row.segment[1:] == (0.0, None) else row.segment) for row in rows
    ]
    refuse_if(len({row.split is None for row in rows}) > 1)
    refuse_if(len({*ids}) < len(ids) or len({*parts}) < len(parts))
    refuse_if(not all((path.parent / row.path).is_file() for row in rows if row.split in _wanted(rows)))
    out: dict[str, list[tuple[Any, ...]]] = {split or "all": [] for split in _wanted(rows)}
    for row, name, clip_id in zip(rows, names, ids, strict=True):
        if row.split in _wanted(rows):
            out[row.split or "all"].append((clip_id, row.path, name, row.segment))
    return out


def _wanted(rows: list[Row]) -> list[str | None]:
    there = {row.split for row in rows}
    return [split for split in (None, "train", "val") if split in there] + (
        ["test"] if "test" in there and "val" not in there else []
    )


def _told(segment: tuple[str, float, float | None] | None) -> str:
    if segment is None:
        return ""
    start, end = (str(n).removesuffix(".0") if n is not None else "" for n in segment[1:])
    return f"#{start}-{end}"


def _classes(labels: list[str]) -> list[str]:
    for label in labels:
        parts = [part for part in re.split(r"[,;|\s]+", label) if part]
        refuse_if(re.fullmatch(r"[-+]\d.*|\[?\d+([,;| ]+\d+)+\]?", label) or not label)
        refuse_if(len(parts) > 1 and {*parts} <= {*labels})
    for mark in ";|":
        parts = [part for label in {*labels} if mark in label for part in {*label.split(mark)}]
        refuse_if(len({*parts}) < len(parts))
    if all(re.fullmatch(r"\d+(\.0*)?", label) for label in labels):
        refuse_if(any(float(label) >= 100_000 for label in labels))
        return [str(int(float(label))) for label in labels]
    refuse_if(any(re.fullmatch(r"\d+(\.\d*)?", label) for label in labels))
    return labels


def _read_list(text: str) -> list[Row]:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return [_line(line) for number, line in enumerate(lines) if number or line != "path\tlabel"]


def _line(line: str) -> Row:
    if "\t" in line:
        path, label = line.rsplit("\t", 1)
        return Row(path.strip(), label.strip())
    if line[0] == '"':
        match = re.fullmatch(r'"((?:[^"]|"")*\.mp4)"(\s*,\s*|\s+)(.+)', line, re.IGNORECASE)
        path = match[1].replace('""', '"') if match else ""
    else:
        match = re.fullmatch(r"(.*?\.mp4)(\s*,\s*|\s+)(.+)", line, re.IGNORECASE)
        path = match[1] if match else ""
    refuse_if(not match)
    assert match is not None
    label = match[3].strip()
    if "," in match[2]:
        cells = next(csv.reader([label]))
        refuse_if(len(cells) != 1)
        return Row(path, cells[0].strip())
    words = [word.strip(",;|") for word in label.split()]
    odd = "#" in label or any(re.fullmatch(r"[-+]?\d+(\.\d*)?", word) for word in (words[0], words[-1]))
    refuse_if(len(words) > 1 and odd)
    return Row(path, label)


def _kinds(names: list[str]) -> list[str | None]:
    of = {re.sub(r"[ -]", "_", name.lower()): kind for kind, alike in KINDS.items() for name in alike}
    plain = [re.sub(r"[ -]", "_", name.lower()) for name in names]
    kinds = [of.get(name) for name in plain]
    kinds = [
        None if kind in plain and name != kind else kind for name, kind in zip(plain, kinds, strict=True)
    ]
    known = [kind for kind in kinds if kind]
    refuse_if(len({*known}) < len(known) or "path" not in known or "label" not in known)
    return kinds


def _read_csv(text: str) -> list[Row]:
    text = "\n".join("" if line.startswith("# ") else line for line in text.split("\n"))
    header = next((line for line in text.split("\n") if line.strip()), "")
    mark = max("\t;,", key=header.count)
    try:
        records = [row for row in csv.reader(io.StringIO(text), delimiter=mark, strict=True) if any(row)]
    except csv.Error:
        raise Refused from None
    refuse_if(not records)
    kinds = _kinds(records[0])
    refuse_if(any(len(row) != len(kinds) for row in records))
    return [
        _row({kind: cell.strip() for kind, cell in zip(kinds, row, strict=True) if kind})
        for row in records[1:]
    ]


def _read_json(text: str, is_array: bool) -> list[Row]:
    def refuse(_: str) -> None:
        raise Refused

    try:
        lines = [text] if is_array else [line for line in text.split("\n") if line.strip()]
        values = [json.loads(line, parse_constant=refuse) for line in lines]
    except json.JSONDecodeError:
        raise Refused from None
    return [_object(value) for value in (values[0] if is_array else values)]


def _object(value: dict[str, Any]) -> Row:
    cells = dict[str, str]()
    for kind, cell in zip(_kinds(list(value)), value.values(), strict=True):
        number = (int,) if kind in ("label", "id") else (int, float) if kind not in ("path", "split") else ()
        if kind:
            allowed = isinstance(cell, (str, *number)) or (cell is None and kind != "path")
            refuse_if(not allowed or isinstance(cell, bool))
            cells[kind] = "" if cell is None else str(cell)
    return _row(cells)


def _row(cells: dict[str, str]) -> Row:
    refuse_if(not cells["path"] or "\n" in cells["path"] + cells["label"])
    refuse_if("split" in cells and cells["split"] not in SPLITS)
    seconds = [cells.get("start", ""), cells.get("end", "")]
    frames = [cells.get("start_frame", ""), cells.get("end_frame", "")]
    refuse_if(
        any(seconds) and any(frame and not second for second, frame in zip(seconds, frames, strict=True))
    )
    segment = None
    if any(seconds + frames):
        start, end = (_number(text, not any(seconds)) for text in (seconds if any(seconds) else frames))
        refuse_if(end is not None and end <= (start or 0))
        segment = ("seconds" if any(seconds) else "frames", start or 0.0, end)
    split = SPLITS[cells["split"]] if "split" in cells else None
    return Row(cells["path"], cells["label"], split, segment, cells.get("id") or None)


def _number(text: str, is_frame: bool) -> float | None:
    if not text:
        return None
    if is_frame:
        refuse_if(not re.fullmatch(r"\d+(\.0)?", text))
    parts = text.split(":")
    refuse_if(not all(re.fullmatch(r"\d+(\.\d+)?", part) for part in parts) or int(float(parts[-2:][0])) > 60)
    return sum(float(part) * 60**power for power, part in enumerate(reversed(parts)))
