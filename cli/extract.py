"""`evl-cache extract`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evl_cache.extract_options import EXTRACT_OPTIONS, Role, options_with
from evl_cache.notation import command_line, format_layers
from evl_cache.progress_lines import extract_progress

from .common import Command, default_device, human_bytes, print_json, say, say_failure, say_outage
from .extract_flags import decoding_of, extract_flags, make_request, say_read
from .mode_option import mode_option

if TYPE_CHECKING:
    from evl_cache.extract import ExtractionJob, ExtractOptions, ExtractResult
    from evl_cache.extract.growth import Growth
    from evl_cache.processes import ProcessPlace

EXAMPLES = """
evl-cache extract --dataset k400 --layers 8-12
evl-cache extract --dataset folder --root clips --frames 8 --stride 4
evl-cache extract --dataset list --list clips.txt --root videos --views 3x1 --cache caches/mine
"""


@click.command(cls=Command, name="extract", examples=EXAMPLES)
@extract_flags(options_with(Role.ESTIMATE))
@mode_option
@click.option("--explain", is_flag=True, help="Only print what --dataset expects.")
@extract_flags(option for option in EXTRACT_OPTIONS if Role.ESTIMATE not in option.role)
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(
    *,
    explain: bool,
    device: str | None,
    batch: int | None,
    decode_workers: int | None,
    decoder: str,
    tolerate_bad_frames: bool,
    clip_timeout: float | None,
    max_failures: str | None,
    outage_patience: float | None,
    retry_failed: bool,
    check_sources: bool,
    retry_doubtful: bool,
    reuse: Path | None,
    as_json: bool,
    **given: Any,
) -> int:
    """Run the frozen backbone once over every clip and cache its features.

    Run the same command again after a kill, or beside another job, on any machine: it goes on, and shares the work
    (docs/cluster.md).
    """
    from evl_cache.extract import ExtractOptions, extract_dataset
    from evl_cache.extract.failure_limit import FailureLimit
    from evl_cache.extract.request import dataset_reader
    from evl_cache.processes import ProcessPlace, Rendezvous

    if explain:
        click.echo(dataset_reader(given["dataset"]).description)
        return 0
    place = ProcessPlace.of_environment()
    rendezvous = Rendezvous.of_environment(place, on_lost=_say_lost)
    device = default_device(device)
    options = ExtractOptions(
        device=device,
        batch=batch,
        decode_workers=decode_workers,
        **decoding_of(device, decoder, tolerate_bad_frames, clip_timeout),
        most_failures=None if max_failures is None else FailureLimit.parse(max_failures),
        outage_patience_s=outage_patience,
        retry_failed=retry_failed,
        check_sources=check_sources,
        retry_doubtful=retry_doubtful,
        reuse=reuse,
    )
    reports: list[dict[str, Any]] = []
    wrong: list[str] = []
    for job, result in extract_dataset(
        make_request(given, pixels=options.decoding.pixels),
        options=options,
        progress=lambda spec: extract_progress(spec.num_clips, spec.split, shown=place.is_first),
        on_read=say_read if place.is_first else lambda read: None,
        on_job=(lambda job: _say_job(job, options)) if place.is_first else lambda job: None,
        on_growth=_say_growth if place.is_first else lambda growth: None,
        on_outage=say_outage,
        rendezvous=rendezvous,
    ):
        wrong += [*result.not_redone, *filter(None, [result.sources_changed])]
        if result.frames_untold:
            wrong.append(result.frames_untold)
        if result.sources_in_doubt and (check_sources or retry_doubtful):
            wrong.append(result.sources_in_doubt)
        elif result.sources_in_doubt and place.is_first:
            say(result.sources_in_doubt, err=True)
        if not place.is_first:
            _say_share(place, job, result)
            continue
        reports.append(_report(job, result))
        if not as_json:
            _say_result(reports[-1])
        for clip, reason in result.failures[:5]:
            say_failure(clip, reason)
    if as_json and place.is_first:
        print_json({"caches": reports})
    for reason in wrong:
        say(reason, err=True)
    return 1 if wrong else _status(place, [report for report in reports if report["failed"]])


def _report(job: ExtractionJob, result: ExtractResult) -> dict[str, Any]:
    from evl_cache.store import cache_parts, cache_size, size_together

    parts = cache_parts(job.cache_path).parts

    return {
        "cache": str(job.cache_path),
        "split": job.spec.split,
        "clips": result.clips,
        "clips_here": result.clips_done_here,
        "was_done": result.was_done,
        "failed": len(result.failures),
        "not_redone": result.not_redone,
        "sources_changed": result.sources_changed,
        "sources_in_doubt": result.sources_in_doubt,
        "clips_doubtful": result.clips_doubtful,
        "clips_cleared": result.clips_cleared,
        "frames_untold": result.frames_untold,
        "bytes": size_together([cache_size(part.path, part.spec) for part in parts]).nbytes,
        "seconds": result.seconds,
        "clips_per_s": result.clips_done_here / result.seconds,
        "cache_digest": result.cache_digest,
    }


def _say_result(report: dict[str, Any]) -> None:
    nothing = "nothing to do, " if report["was_done"] else ""
    examined = report["clips_doubtful"] + report["clips_cleared"]
    frames = f"{report['clips_doubtful']} of {examined} examined were doubtful, " if examined else ""
    say(
        f"{report['cache']}: {nothing}{frames}{report['clips']} clips, {report['failed']} failed, "
        f"{human_bytes(report['bytes'])}, {report['seconds']:.1f} s, digest {report['cache_digest'][:16]}"
    )


def _say_share(place: ProcessPlace, job: ExtractionJob, result: ExtractResult) -> None:
    """What a process that is not the first did of a cache."""
    say(
        f"process {place.rank} of {place.world}: {result.clips_done_here} of {result.clips} clips of {job.cache_path}, "
        f"{result.seconds:.1f} s",
        err=True,
    )


def _say_lost(reason: str) -> None:
    say(f"the rendezvous is lost ({reason}); going on by the locks on the disk", err=True)


def _status(place: ProcessPlace, failed: list[dict[str, Any]]) -> int:
    """Return the exit status: 3 where clips failed, unless torchrun would take that for a crash and start anew."""
    if not failed:
        return 0
    looks = [command_line(("evl-cache", "info", "--failures"), report["cache"]) for report in failed]
    say(
        f"{sum(report['failed'] for report in failed)} clips failed; see {', '.join(filter(None, looks)) or 'the failures'}, "
        "mend them and use --retry-failed",
        err=True,
    )
    return 0 if place.is_supervised else 3


def _say_job(job: ExtractionJob, options: ExtractOptions) -> None:
    from evl_cache.extract.older_rule import told_of_rule

    t = job.tower.spec
    say(
        f"{t.model} ({t.pretrained}), {t.image_size} pixels, patch {t.patch_size}, "
        f"{'QuickGELU' if t.quick_gelu else 'GELU'}, mean {_numbers(t.mean)}, std {_numbers(t.std)}; "
        f"layers {format_layers(job.spec.layers)}, {job.spec.views.frames} frames -> {job.cache_path}",
        err=True,
    )
    if told := told_of_rule(job, options):
        say(told, err=True)


def _say_growth(growth: Growth) -> None:
    for line in growth.told:
        say(line, err=True)


def _numbers(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.3f}" for value in values)
