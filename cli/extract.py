"""`evl-cache extract`."""

from pathlib import Path
from typing import Any

import click

from evl_cache.extract_options import VIEW_RECIPES
from evl_cache.progress_lines import extract_progress
from evl_cache.spec import CODECS, MAP_STORAGE, SAMPLING, SOFTWARE_PIXELS, TOKEN_STORAGE

from .common import Command, default_device, human_bytes, print_json
from .mode import mode_option

EXAMPLES = """
evl-cache extract --dataset k400 --layers 8-12
evl-cache extract --dataset folder --root clips --frames 8 --stride 4
evl-cache extract --dataset list --list clips.txt --root videos --views 3x1 --cache caches/mine
"""


def dataset_options(function: Any) -> Any:
    """The options that say what is extracted; `estimate` takes them too."""
    options = [
        click.option(
            "--dataset",
            required=True,
            metavar="NAME",
            help="k400, ssv2, ucf101, hmdb51, folder, list, scenes, motions, …",
        ),
        click.option(
            "--root", type=click.Path(path_type=Path), help="Folder of the videos [$EVL_DATA_ROOT/NAME]."
        ),
        click.option("--split", help="Only this split [both train and val]."),
        click.option(
            "--annotations",
            type=click.Path(path_type=Path),
            help="File or folder [under --root].",
        ),
        click.option(
            "--list",
            "list_path",
            type=click.Path(path_type=Path),
            help="Lines 'path label', for --dataset list.",
        ),
        click.option(
            "--model",
            default="ViT-B-16-quickgelu",
            show_default=True,
            help="open_clip or timm/NAME, evl-tiny, JSON.",
        ),
        click.option("--pretrained", help="Tag, file, or none (seeded random) [openai; evl-tiny's own]."),
        click.option("--layers", metavar="8-12", help="Counted from 1, also 9,11,12 [the last 4]."),
        click.option(
            "--recipe",
            type=click.Choice(list(VIEW_RECIPES)),
            metavar="NAME",
            help="Published views: k400-8, -16, -32, ssv2-8, …",
        ),
        click.option("--frames", type=int, help="Frames of a view [8]."),
        click.option("--sampling", type=click.Choice(SAMPLING), help="[strided]"),
        click.option("--stride", type=int, help="Frames between two of a view [16]."),
        click.option("--views", metavar="TxS", help="Temporal x spatial views [1x1]."),
        click.option(
            "--train-views",
            type=click.IntRange(1),
            metavar="V",
            help="Augmented, of the train split.",
        ),
        click.option(
            "--augment-seed", type=click.IntRange(0), metavar="N", help="What they are drawn from [0]."
        ),
        click.option("--flip", is_flag=True, help="Mirror half of them (published: none)."),
        click.option("--tokens", type=click.Choice(TOKEN_STORAGE), default="int8", show_default=True),
        click.option("--maps", type=click.Choice(MAP_STORAGE), default="uint8", show_default=True),
        click.option(
            "--codec",
            type=click.Choice(CODECS),
            default="default",
            show_default=True,
            help="Lossless profile.",
        ),
        click.option(
            "--compute-dtype",
            type=click.Choice(["float32", "float16", "bfloat16"]),
            help="[float16 on a GPU]",
        ),
        click.option(
            "--cache",
            type=click.Path(path_type=Path),
            help="To write [named under $EVL_CACHE_ROOT].",
        ),
        click.option("--limit", type=click.IntRange(1), help="Only the first N clips."),
        click.option(
            "--allow-missing",
            type=float,
            default=0.0,
            metavar="PERCENT",
            help="Of files that are not there [0].",
        ),
        click.option("--device", help="cpu, cuda, cuda:N [the GPU where there is one]."),
        click.option(
            "--batch", type=click.IntRange(1), help="Samples of a forward pass [8 on a CPU, 32 on a GPU]."
        ),
        click.option(
            "--decode-workers",
            type=click.IntRange(1),
            default=2,
            show_default=True,
            help="Processes that decode.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def make_views(given: dict[str, Any]) -> tuple[Any, Any]:
    """Views of validation, and those of the train split where they are others (None: the same)."""
    from dataclasses import replace

    from evl_cache.extract.request import dataset_reader
    from evl_cache.extract_options import VIEW_RECIPES
    from evl_cache.notation import parse_views
    from evl_cache.spec import ViewSpec

    recipe = given.get("recipe")
    plain: dict[str, Any] = {"frames": 8, "sampling": "strided", "stride": 16, "views": "1x1"}
    published = dict(VIEW_RECIPES[recipe]) if recipe else plain | dict(dataset_reader(given["dataset"]).views)
    chosen: dict[str, Any] = {
        name: published[name] if given[name] is None else given[name]
        for name in ("frames", "sampling", "views")
    }
    stride = given["stride"]
    if stride is None and chosen["sampling"] == "strided":
        stride = published.get("stride") or 16
    temporal, spatial = parse_views(chosen["views"])
    views = ViewSpec(
        frames=chosen["frames"],
        sampling=chosen["sampling"],
        stride=stride,
        temporal_views=temporal,
        spatial_views=spatial,
    )
    count = given.get("train_views") or 0
    if not (recipe or count or given.get("flip") or given.get("augment_seed")):
        return views, None
    return views, replace(
        views,
        temporal_views=1,
        spatial_views=1,
        train_views=count,
        augment_seed=given.get("augment_seed") or 0,
        flip=bool(given.get("flip")),
    )


def make_request(given: dict[str, Any]) -> Any:
    """The ExtractRequest of the options above."""
    from evl_cache.extract.request import ExtractRequest
    from evl_cache.notation import parse_layers

    views, train_split_views = make_views(given)
    same = "dataset root split annotations list_path model pretrained tokens maps codec compute_dtype cache limit"
    return ExtractRequest(
        **{name: given[name] for name in same.split()},
        layers=None if given["layers"] is None else parse_layers(given["layers"]),
        views=views,
        train_split_views=train_split_views,
        allow_missing_percent=given["allow_missing"],
        pixels=given.get("pixels", SOFTWARE_PIXELS),
    )


def make_options(given: dict[str, Any], device: str, **more: Any) -> Any:
    """The ExtractOptions of the options above."""
    from evl_cache.extract.job import ExtractOptions

    batch = given["batch"] or (8 if device == "cpu" else 32)
    return ExtractOptions(device=device, batch=batch, decode_workers=given["decode_workers"], **more)


@click.command(cls=Command, name="extract", examples=EXAMPLES)
@dataset_options
@mode_option
@click.option("--explain", is_flag=True, help="Only print what --dataset expects.")
@click.option(
    "--decoder",
    type=click.Choice(["auto", "decord", "pyav", "torchcodec"]),
    default="auto",
    show_default=True,
    help="auto: PyAV where decord fails; torchcodec: on the GPU.",
)
@click.option("--tolerate-bad-frames", is_flag=True, help="Keep clips with damaged frames.")
@click.option("--clip-timeout", type=float, metavar="SECONDS", help="For decoding a clip [120].")
@click.option("--max-failures", metavar="N%", help="Stop when more clips fail: 20, 5% [never].")
@click.option("--retry-failed", is_flag=True, help="Redo the blocks of failed clips.")
@click.option("--reuse", type=click.Path(path_type=Path), help="Copy rows of equal features and files.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(
    explain: bool,
    decoder: str,
    tolerate_bad_frames: bool,
    clip_timeout: float | None,
    max_failures: str | None,
    retry_failed: bool,
    reuse: Path | None,
    as_json: bool,
    **given: Any,
) -> int:
    """Run the frozen backbone once over every clip and cache its features.

    Run the same command again after a kill, or beside another job, on any machine: it goes on, and shares the work
    (docs/cluster.md).
    """
    from evl_cache.extract.failure_limit import FailureLimit
    from evl_cache.extract.request import dataset_reader, extract_dataset
    from evl_cache.processes.group import local_device
    from evl_cache.processes.place import ProcessPlace
    from evl_cache.processes.rendezvous import Rendezvous
    from evl_cache.video import DecodeOptions
    from evl_cache.video.pool import DEFAULT_TIMEOUT_S

    if explain:
        click.echo(dataset_reader(given["dataset"]).description)
        return 0
    place = ProcessPlace.of_environment()
    rendezvous = Rendezvous.of_environment(place, on_lost=_say_lost)
    device = default_device(local_device(default_device(given["device"])))
    decoding = DecodeOptions(decoder=decoder, tolerate_bad_frames=tolerate_bad_frames, device=device)
    given["pixels"] = decoding.pixels
    options = make_options(
        given,
        device,
        retry_failed=retry_failed,
        reuse=reuse,
        decoding=decoding,
        most_failures=None if max_failures is None else FailureLimit.parse(max_failures),
        clip_timeout_s=DEFAULT_TIMEOUT_S if clip_timeout is None else clip_timeout,
    )
    reports: list[dict[str, Any]] = []
    for job, result in extract_dataset(
        make_request(given),
        options=options,
        progress=lambda spec: extract_progress(spec.num_clips, spec.split, shown=place.is_first),
        on_job=_say_job if place.is_first else lambda job: None,
        rendezvous=rendezvous,
    ):
        if not place.is_first:
            _say_share(place, job, result)
            continue
        reports.append(_report(job, result))
        if not as_json:
            _say_result(reports[-1])
        for clip, reason in result.failures[:5]:
            click.echo(f"failed: {clip}: {reason}", err=True)
    if as_json and place.is_first:
        print_json({"caches": reports})
    return _status(place, sum(report["failed"] for report in reports))


def _report(job: Any, result: Any) -> dict[str, Any]:
    return {
        "cache": str(job.cache_path),
        "split": job.spec.split,
        "clips": result.clips,
        "clips_here": result.clips_done_here,
        "failed": len(result.failures),
        "bytes": sum(file.stat().st_size for file in job.cache_path.rglob("*") if file.is_file()),
        "seconds": result.seconds,
        "clips_per_s": result.clips_done_here / result.seconds,
        "cache_digest": result.cache_digest,
    }


def _say_result(report: dict[str, Any]) -> None:
    click.echo(
        f"{report['cache']}: {report['clips']} clips, {report['failed']} failed, {human_bytes(report['bytes'])}, "
        f"{report['seconds']:.1f} s, digest {report['cache_digest'][:16]}"
    )


def _say_share(place: Any, job: Any, result: Any) -> None:
    """What a process that is not the first did of a cache."""
    click.echo(
        f"process {place.rank} of {place.world}: {result.clips_done_here} of {result.clips} clips of {job.cache_path}, "
        f"{result.seconds:.1f} s",
        err=True,
    )


def _say_lost(reason: str) -> None:
    click.echo(f"the rendezvous is lost ({reason}); going on by the locks on the disk", err=True)


def _status(place: Any, failed: int) -> int:
    """Of the first process: 3 where clips failed, unless torchrun would take that for a crash and start anew."""
    if not failed:
        return 0
    click.echo(
        f"{failed} clips failed; see evl-cache info --failures, mend them and use --retry-failed",
        err=True,
    )
    return 0 if place.is_supervised else 3


def _say_job(job: Any) -> None:
    from evl_cache.notation import format_layers

    t = job.tower.spec
    click.echo(
        f"{t.model} ({t.pretrained}), {t.image_size} pixels, patch {t.patch_size}, "
        f"{'QuickGELU' if t.quick_gelu else 'GELU'}, mean {_numbers(t.mean)}, std {_numbers(t.std)}; "
        f"layers {format_layers(job.spec.layers)}, {job.spec.views.frames} frames -> {job.cache_path}",
        err=True,
    )


def _numbers(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.3f}" for value in values)
