"""Read Kinetics-400, 600 and 700: CSV files of `label,youtube_id,time_start,time_end,split`, ten-second clips."""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from evl_cache.clips import SPLIT_NAMES, Clip, ClipList, normal_split
from evl_cache.datasets.places import (
    VideoTree,
    annotation_folders,
    files_like,
    find_annotation,
    find_annotation_if_any,
    join,
    require_root,
)
from evl_cache.datasets.text_file import read_text
from evl_cache.errors import UsageError

_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
_EXPECTED = f"a CSV file whose first line is {','.join(_COLUMNS)} (is_cc may follow)"
_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]+")
_SECONDS = re.compile(r"(?P<whole>[0-9]{1,6})(?:\.0*)?")  # pandas writes 59.0
_SPLIT_FOLDERS = {
    "train": ("train", "training", "videos_train", "train_256"),
    "val": ("val", "validate", "validation", "valid", "videos_val", "val_256"),
    "test": ("test", "videos_test", "test_256"),
}
_FILE_SPLITS = {"train": ("train",), "val": ("val", "validate", "validation"), "test": ("test",)}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    line: int
    label: str
    youtube_id: str
    seconds: tuple[int, int]
    split: str

    @property
    def clip_id(self) -> str:
        """The published name of the clip's file, without its ending."""
        return f"{self.youtube_id}_{self.seconds[0]:06d}_{self.seconds[1]:06d}"

    @property
    def short_times(self) -> str:
        """The name with times as some downloaders write them, without leading zeros."""
        return f"{self.youtube_id}_{self.seconds[0]}_{self.seconds[1]}"


@dataclass(frozen=True, kw_only=True)
class _Table:
    """The rows of one annotation file."""

    path: Path
    rows: tuple[_Row, ...]

    def of(self, split: str) -> tuple[_Row, ...]:
        """Return the rows of a split."""
        return tuple(row for row in self.rows if row.split == split)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that rows have, in the file's order."""
        return tuple(dict.fromkeys(row.split for row in self.rows))


def read_kinetics(
    root: Path, *, release: int, annotations: Path | None, split: str | None
) -> dict[str, ClipList]:
    """Return clip lists by split; without `split` they are train and val, or those of them in a given annotation file.

    For every split, classes are numbered from 0 in alphabetical order of the train annotation's names. Where there is no
    train annotation, the split's own names are numbered; the published val files hold every class.

    Args:
        root: folder of the videos: `<split>/<file>`, `<split>/<class>/<file>`, or either without `<split>`.
        release: 400, 600 or 700.
        annotations: a CSV file, or a folder of them; None looks in `annotations` under the root,
            in `kinetics400` (600, 700), and in the root.
        split: train, val (validate, validation) or test.

    Raises: UsageError for missing or malformed annotation files, with the line.
    """
    require_root(root, dataset=f"Kinetics-{release}")
    wanted = (normal_split(split),) if split is not None else ("train", "val")
    given_file = annotations if annotations is not None and annotations.is_file() else None
    if given_file is not None:
        given = _read_table(given_file)
        held = [name for name in wanted if given.of(name)] or wanted
        tables = {name: _checked(given, name) for name in held}
        folders = [given_file.parent]
    else:
        folders = annotation_folders(root, annotations, _usual_folders(release))
        tables = {name: _checked(_read_table(_find(folders, release, name)), name) for name in wanted}
    train = _train_table(tables, folders, release)
    tree = VideoTree(root, suffix=".mp4")
    is_undivided = given_file is not None and len(given.splits) == 1
    known = (*tables.values(), *filter(None, [train]))
    once = lru_cache(lambda: _named_once(known, folders, release))
    lists = {name: _clip_list(tree, table, train or table, name, once) for name, table in tables.items()}
    longer = {name: [] if given_file else _longer_beside(table) for name, table in tables.items()}
    return {
        name: replace(clips, is_undivided=is_undivided, remarks=(*longer[name], *clips.remarks))
        for name, clips in lists.items()
    }


def _named_once(known: Iterable[_Table], folders: Iterable[Path], release: int) -> set[str]:
    """Return the YouTube ids of which the annotations have one clip: a file of that name is no other clip's.

    The tables of splits that were not asked for count, too: what is a clip's file does not depend on `--split`.
    """
    tables = {table.path: table for table in known}
    names = [name for split in _FILE_SPLITS for name in _file_names(release, split)]
    for path in (folder / name for folder in folders for name in names):
        if path not in tables and path.is_file():
            tables[path] = _read_table(path)
    clips = {(row.youtube_id, row.seconds) for table in tables.values() for row in table.rows}
    return {name for name, number in Counter(name for name, _ in clips).items() if number == 1}


def _longer_beside(table: _Table) -> list[str]:
    """Return a remark for each text file beside a table that begins like its name and has more lines than it has clips."""
    texts = [p for p in files_like(table.path.parent, [table.path.name]) if p.suffix.lower() == ".txt"]
    counted = [(path.name, len(path.read_bytes().splitlines())) for path in texts]
    return [
        f"{name} beside it has {lines} lines, more than its {len(table.rows)} rows, and is not read"
        for name, lines in counted
        if lines > len(table.rows)
    ]


def _usual_folders(release: int) -> list[str]:
    return ["annotations", f"kinetics{release}", f"kinetics_{release}", f"kinetics{release}_2020"]


def _find(folders: Sequence[Path], release: int, split: str) -> Path:
    return find_annotation(folders, _file_names(release, split), what=_what(release, split))


def _train_table(tables: Mapping[str, _Table], folders: Sequence[Path], release: int) -> _Table | None:
    """Return the table that numbers the classes, read already or beside the others on the disk; None without one."""
    for table in tables.values():
        if table.of("train"):
            return _checked(table, "train")
    path = find_annotation_if_any(folders, _file_names(release, "train"), what=_what(release, "train"))
    return None if path is None else _checked(_read_table(path), "train")


def _what(release: int, split: str) -> str:
    return f"{split} annotation of Kinetics-{release}"


def _checked(table: _Table, split: str) -> _Table:
    if not table.of(split):
        held = " and ".join(table.splits)
        raise UsageError(
            f"{table.path}, line {table.rows[0].line}: no row of split {split}, only {held}; "
            f"expected rows of {split}: name another file with --annotations, or another --split"
        )
    for row in table.of(split):
        if not row.label:
            raise UsageError(
                f"{table.path}, line {row.line}: no label; expected a class name (annotations without labels cannot be used)"
            )
    return table


def _file_names(release: int, split: str) -> list[str]:
    prefixes = ("", f"kinetics{release}_", f"kinetics_{release}_", f"kinetics-{release}_", f"k{release}_")
    later = (f"kinetics{release}_2020_", "kinetics_")
    return [f"{prefix}{name}.csv" for prefix in (*prefixes, *later) for name in _FILE_SPLITS[split]]


def _read_table(path: Path) -> _Table:
    text = read_text(path, expected=_EXPECTED)
    records = _records(text, path)
    line, header = next(records, (1, []))
    names = [name.strip().lower() for name in header]
    absent = [name for name in _COLUMNS if name not in names]
    if absent:
        raise UsageError(
            f"{path}, line {line}: header {','.join(header)[:80]!r} lacks {', '.join(absent)}; "
            f"expected {_EXPECTED}"
        )
    at = tuple(names.index(name) for name in _COLUMNS)
    rows = tuple(_row(fields, at, width=len(names), path=path, line=line) for line, fields in records)
    if not rows:
        raise UsageError(f"{path}, line {line}: only a header; expected a line for each clip below it")
    return _Table(path=path, rows=rows)


def _records(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UsageError(f"{path}, line {line}: not CSV ({error}); expected {_EXPECTED}") from error
        if any(field.strip() for field in fields):
            yield line, fields


def _row(fields: list[str], at: tuple[int, ...], *, width: int, path: Path, line: int) -> _Row:
    where = f"{path}, line {line}"
    if len(fields) != width:
        raise UsageError(
            f"{where}: {len(fields)} fields; expected {width}, as in the header (quote a name with a comma)"
        )
    label, youtube_id, start, end, split = (fields[i].strip() for i in at)
    if _YOUTUBE_ID.fullmatch(youtube_id) is None:
        raise UsageError(f"{where}: youtube_id {youtube_id!r:.60}; expected letters, digits, - and _")
    if split.lower() not in SPLIT_NAMES:
        raise UsageError(f"{where}: split {split!r:.60}; expected train, val, validate or test")
    times = _seconds(start, "time_start", where), _seconds(end, "time_end", where)
    if times[1] <= times[0]:
        raise UsageError(
            f"{where}: time_end {times[1]} is not after time_start {times[0]}; expected a later second"
        )
    return _Row(
        line=line, label=label, youtube_id=youtube_id, seconds=times, split=SPLIT_NAMES[split.lower()]
    )


def _seconds(text: str, name: str, where: str) -> int:
    match = _SECONDS.fullmatch(text)
    if match is None:
        raise UsageError(f"{where}: {name} {text!r:.60}; expected a whole number of seconds, 0 to 999999")
    return int(match["whole"])


def _clip_list(
    tree: VideoTree, table: _Table, numbering: _Table, split: str, once: Callable[[], Container[str]]
) -> ClipList:
    rows = table.of(split)
    classes = tuple(sorted({row.label for row in numbering.of("train") or rows}))
    numbers = {name: number for number, name in enumerate(classes)}
    for row in rows:
        if row.label not in numbers:
            raise UsageError(
                f"{table.path}, line {row.line}: label {row.label!r:.100} is in no train row of {numbering.path}; "
                "expected classes of the train annotation, which numbers them"
            )
    own = [like for name in _SPLIT_FOLDERS[split] for like in tree.folders_like("", name)]
    found = _found(tree, {row.clip_id for row in rows}, own)
    short = _found_as(tree, {r.clip_id: r.short_times for r in rows if r.clip_id not in found}, own)
    found |= short
    by_id = _found_as(tree, {r.clip_id: r.youtube_id for r in rows if r.clip_id not in found}, own)
    if by_id:
        by_id = {r.clip_id: by_id[r.clip_id] for r in rows if r.clip_id in by_id and r.youtube_id in once()}
    found |= by_id
    clips = tuple(
        Clip(
            id=row.clip_id,
            path=found.get(row.clip_id) or _expected_path(tree, row, (own or [split])[0]),
            label=numbers[row.label],
            split=split,
            line=row.line,
        )
        for row in rows
    )
    remarks = _told(short, "times in the name without leading zeros") + _told(
        by_id, "no times in the name", "; each is taken whole, as the seconds of its row"
    )
    return ClipList(clips=clips, classes=classes, source=str(table.path), remarks=remarks)


def _told(found: Mapping[str, str], what: str, more: str = "") -> tuple[str, ...]:
    if not found:
        return ()
    number = f"{len(found)} {'file has' if len(found) == 1 else 'files have'}"
    return (f"{number} {what}, such as {next(iter(found.values()))}{more}",)


def _found(tree: VideoTree, wanted: set[str], own: Sequence[str]) -> dict[str, str]:
    """Return paths by name without ending; a folder is listed only while a clip is missing in the ones before."""
    found: dict[str, str] = {}
    for folder in _places(tree, own):
        videos = tree.videos(folder)
        new = [name for name in videos if name in wanted and name not in found]
        found |= {name: join(folder, videos[name]) for name in new}
        if len(found) == len(wanted):
            break
    return found


def _found_as(tree: VideoTree, names: Mapping[str, str], own: Sequence[str]) -> dict[str, str]:
    """Return paths by clip id of files with other names; `names` has them by clip id."""
    found = _found(tree, {*names.values()}, own) if names else {}
    return {clip_id: found[name] for clip_id, name in names.items() if name in found}


def _places(tree: VideoTree, own: Sequence[str]) -> Iterator[str]:
    """Yield where videos of a split may lie, whose own folders under the root are `own`."""
    yield from own
    for folder in own:
        yield from (join(folder, name) for name in tree.folders(folder))
    yield ""
    taken = {name for names in _SPLIT_FOLDERS.values() for name in names}
    yield from (name for name in tree.folders("") if name.lower() not in taken)


def _expected_path(tree: VideoTree, row: _Row, own: str) -> str:
    """Return where a missing clip would be in the split's folder, by the layout of the other clips."""
    by_class = tree.folders(own)
    folders = [name for name in (row.label, row.label.replace(" ", "_")) if name in by_class]
    return join(own, (folders or [row.label])[0] if by_class else "", f"{row.clip_id}.mp4")
