"""`evl-cache predict`."""

import io
import sys
from pathlib import Path
from typing import TextIO

import click

from evl_cache.errors import UsageError, reason_alone
from evl_cache.extract_options import Role, options_with

from .cache_flags import run_precision_flag
from .common import (
    Command,
    check_file_to_write,
    default_device,
    print_json,
    say,
    say_failure,
    say_outage,
    write_csv,
)
from .extract_flags import decoding_of, extract_flags

EXAMPLES = """
evl-cache predict "videos/clip 3.mp4" --run runs/fold1
evl-cache predict videos clips --run runs/fold1 --topk 3 --csv labels.csv
"""


@click.command(cls=Command, name="predict", examples=EXAMPLES)
@click.argument("videos", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--run", type=click.Path(path_type=Path), required=True, help="Run directory of train.")
@click.option("--topk", type=click.IntRange(1), default=5, show_default=True, help="Labels of a video.")
@click.option("--best", is_flag=True, help="The head of the run's best epoch, not of its last.")
@click.option("--model", help="Where the run's tower is now [as the run says].")
@click.option("--pretrained", help="Where its weights are now [as the run says].")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Samples of a pass.")
@extract_flags(options_with(Role.DECODING))
@run_precision_flag
@click.option("--device", help="cpu, cuda, cuda:N [the GPU where there is one].")
@click.option("--csv", "csv_path", metavar="FILE", help="Write video,rank,label,score; - is the terminal.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(
    *,
    videos: tuple[Path, ...],
    run: Path,
    topk: int,
    best: bool,
    model: str | None,
    pretrained: str | None,
    batch: int,
    decode_workers: int | None,
    decoder: str,
    tolerate_bad_frames: bool,
    clip_timeout: float | None,
    precision: str | None,
    device: str | None,
    csv_path: str | None,
    as_json: bool,
) -> int:
    """Label videos, and those in folders, with a run's head.

    Tower, sampling and views are the run's own. Exit status 3: some videos could not be read.
    """
    from evl_cache.datasets import describe_passed_over
    from evl_cache.live.predict import count_passed_over, links_passed_over, predict

    if csv_path == "-" and as_json:
        raise UsageError("--csv - and --json both write to stdout; use one of them, or --csv FILE --json")
    if csv_path is not None and csv_path != "-":
        check_file_to_write("--csv", Path(csv_path))
    device = default_device(device)
    if others := count_passed_over(videos):
        say(
            f"passed over {describe_passed_over(others)}, no videos by their endings; files that are named are taken",
            err=True,
        )
    if links := links_passed_over(videos):
        say(
            f"links to folders are not followed ({len(links)}, such as {links[0]}); name the folders themselves",
            err=True,
        )
    found = predict(
        run,
        videos,
        model=model,
        pretrained=pretrained,
        device=device,
        precision=precision,
        batch=batch,
        workers=decode_workers,
        **decoding_of(device, decoder, tolerate_bad_frames, clip_timeout),
        best=best,
        on_outage=say_outage,
    )
    labelled = list(zip(map(str, found.videos), found.top(topk), strict=True))
    if csv_path is not None:
        _write_csv(csv_path, labelled)
    if as_json:
        print_json(
            {
                "run": str(run),
                "precision": found.precision,
                "videos": [
                    {"video": video, "labels": [{"label": name, "score": value} for name, value in labels]}
                    for video, labels in labelled
                ],
                "failures": [
                    {"video": str(video), "reason": reason_alone(reason, str(video))}
                    for video, reason in found.failures
                ],
            }
        )
    elif csv_path != "-":
        for video, labels in labelled:
            say(video)
            for name, value in labels:
                say(f"  {100 * value:6.2f} %  {name}")
    for failed, reason in found.failures:
        say_failure(failed, reason)
    return 3 if found.failures else 0


def _write_csv(path: str, labelled: list[tuple[str, list[tuple[str, float]]]]) -> None:
    rows = [
        (video, rank, name, f"{value:.6f}")
        for video, labels in labelled
        for rank, (name, value) in enumerate(labels, 1)
    ]
    if path == "-":
        _write_rows(sys.stdout, rows)
        return
    target = Path(path).resolve()
    if target.exists() and not target.is_file():  # a pipe or a device
        with target.open("w", newline="", encoding="utf-8") as file:
            _write_rows(file, rows)
        return
    from evl_cache.runs import write_text

    lines = io.StringIO(newline="")
    _write_rows(lines, rows)
    write_text(target, lines.getvalue())


def _write_rows(file: TextIO, rows: list[tuple[str, int, str, str]]) -> None:
    write_csv(file, [("video", "rank", "label", "score"), *rows])
