"""The command line from end to end, on rendered clips: results, exit statuses, one-line errors, help that runs."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from evl_cache.datasets.registry import DATASETS
from evl_cache_cli.main import COMMANDS, cli, main
from tests.support.example_data import DEMO_TOWER, OFFICIAL, ROOT

ELSEWHERE = ("s3://", "https://", "/shared/", "/data/caches")  # places that no test machine has
SUBPROCESS = {"capture_output": True, "text": True, "timeout": 60, "check": False}


@pytest.fixture
def run(capsys):
    """Run `main`; gives exit status, stdout, stderr. What main changes in the process is restored."""

    def call(*args: str) -> tuple[int, str, str]:
        environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
        torch.set_num_threads(1)
        capsys.readouterr()
        try:
            main(list(args))
        except SystemExit as stop:
            status = stop.code
        finally:
            signal.signal(signal.SIGTERM, handler)
            os.environ.clear()
            os.environ.update(environment)
        assert isinstance(status, int)
        return (status, *capsys.readouterr())

    return call


def error_of(result: tuple[int, str, str], status: int) -> str:
    """The one line of an error, the last; what `extract` says of clips before it is none."""
    assert result[0] == status, result
    *before, last = result[2].splitlines()
    assert last.startswith("error: "), result[2]
    assert all(
        re.match(r"(train|val|all): \d+ clips? of |[\w./]+: .* than a view lies over ", each)
        for each in before
    ), before
    assert result[1] == ""
    return last


EXTRACT_LIST = "extract --dataset list --list clips.txt --root videos --cache caches/mine".split()


# The work


def test_both_commands_as_typed_on_a_tree_laid_out_as_published(work, run, monkeypatch):
    monkeypatch.setenv("EVL_CACHE_EXTRACT_MODEL", "deep-tower.json")
    status, _, err = run(*"extract --dataset k400 --layers 8-12".split())
    assert status == 0, err
    status, out, err = run(*"train --head decoder4".split())
    assert status == 0, err
    assert "of 2 clips" in out and "runs/k400-train-" in out
    config = json.loads(next(Path("runs").glob("*/config.json")).read_text())
    assert config["layers"] == [9, 10, 11, 12] and config["training"]["epochs"] == 30


def test_what_a_data_set_needs_on_the_disk_is_told_and_documented(run):
    page = (ROOT / "docs" / "datasets.md").read_text()
    for name, reader in DATASETS.items():
        assert run("extract", "--dataset", name, "--explain") == (0, reader.description + "\n", "")
        assert f"## {name}\n\n```text\n{reader.description}\n```\n" in page
    assert "unknown data set 'x'" in error_of(run("extract", "--dataset", "x", "--explain"), 2)


def test_folds_of_a_data_set_are_not_mixed_up(work, run, monkeypatch):
    monkeypatch.setenv("EVL_CACHE_EXTRACT_MODEL", str(DEMO_TOWER))
    for fold in range(2):  # what fold 0 validates on, fold 1 trains on
        lines = Path("clips.txt").read_text().splitlines()
        for split, part in (("train", lines[5 * fold :][:5]), ("val", (lines + lines)[5 + 5 * fold :][:5])):
            Path(f"{split}{fold}.txt").write_text("\n".join(part) + "\n")
            args = f"extract --dataset list --list {split}{fold}.txt --root videos --split {split}"
            assert run(*args.split(), "--layers", "4", "--stride", "1")[0] == 0
    train = "train --dataset list --head decoder1 --epochs 1".split()
    message = error_of_last_line(run(*train), 2)
    assert "several caches of list under caches fit; name one with --cache and --val-cache" in message
    for cache in Path("caches").glob("*"):
        first = json.loads((cache / "clips.jsonl").read_text().splitlines()[0])
        if cache.name.startswith("list-val") and first["id"] == "clip 0.mp4":
            shutil.rmtree(cache)  # fold 1's: only fold 0 is whole now
    assert run(*train)[0] == 0


def test_a_folder_from_videos_to_scores(work, run):
    status, out, err = run("extract", "--dataset", "folder", "--root", "clips", "--stride", "1", "--json")
    assert status == 0
    caches = json.loads(out)["caches"]
    assert [(cache["split"], cache["clips"], cache["failed"]) for cache in caches] == [
        ("train", 6, 0),
        ("val", 6, 0),
    ]
    assert all(Path(cache["cache"]).parent == Path("caches") and cache["bytes"] > 0 for cache in caches)
    assert "demo-tower (none), 64 pixels, patch 16, QuickGELU, mean 0.481/" in err

    status, out, _ = run("info", caches[0]["cache"], "--json")
    found = json.loads(out)
    assert status == 0 and found["is_complete"] and found["clips_done"] == 6 and found["clips_failed"] == 0
    assert found["spec"]["layers"] == [1, 2, 3, 4] and found["spec"]["views"]["stride"] == 1
    assert found["cache_digest"] == caches[0]["cache_digest"]

    train = [
        "train",
        "--dataset",
        "folder",
        "--head",
        "decoder2",
        "--epochs",
        "2",
        "--batch",
        "4",
        "--out",
        "runs/a",
    ]
    status, out, _ = run(*train, "--json")
    trained = json.loads(out)
    assert status == 0 and trained["run"] == "runs/a" and trained["val_clips"] == 6
    assert trained["cache_fingerprint"] == caches[0]["cache_digest"]

    status, out, _ = run("eval", "--cache", caches[1]["cache"], "--run", "runs/a", "--json")
    scored = json.loads(out)
    assert status == 0
    assert (scored["top1"], scored["top5"]) == (trained["top1"], trained["top5"])
    assert scored["cache_fingerprint"] == caches[1]["cache_digest"]
    assert scored["precision"] == "float32"

    status, out, _ = run(
        "eval", "--cache", caches[1]["cache"], "--run", "runs/a", "--precision", "bfloat16", "--json"
    )
    lower = json.loads(out)
    assert status == 0 and lower["precision"] == "bfloat16"
    assert lower["loss"] != scored["loss"] and lower["loss"] == pytest.approx(scored["loss"], rel=0.05)
    message = error_of(
        run(
            "eval", "--cache", caches[1]["cache"], "--run", "runs/a", "--device", "cpu", "--precision", "tf32"
        ),
        2,
    )
    assert "tf32 on cpu" in message and "use --precision float32" in message


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.rglob("*")) if f.is_file()
    }


def test_extracting_twice_does_nothing_new(work, run):
    status, out, _ = run(*EXTRACT_LIST, "--json")
    first, before = json.loads(out)["caches"][0], files_of(Path("caches"))
    status, out, _ = run(*EXTRACT_LIST, "--json")
    second = json.loads(out)["caches"][0]
    assert status == 0 and second["cache_digest"] == first["cache_digest"]
    assert first["clips_per_s"] > 0 and second["clips_per_s"] == 0
    data = {name: stamp for name, stamp in before.items() if "manifest" not in name}
    after = files_of(Path("caches"))
    assert {name: after[name] for name in data} == data and after.keys() == before.keys()


def test_other_options_for_the_same_cache_are_refused_by_name(work, run):
    assert run(*EXTRACT_LIST, "--limit", "3")[0] == 0
    message = error_of_last_line(run(*EXTRACT_LIST, "--limit", "3", "--frames", "4"), 2)
    assert "views.frames: 4, not 8" in message and "choose another --cache" in message


def error_of_last_line(result: tuple[int, str, str], status: int) -> str:
    assert result[0] == status, result
    *notes, last = result[2].splitlines()
    assert last.startswith("error: ") and not any("Traceback" in note for note in notes)
    return last


def test_options_come_from_the_environment_too(work, run, monkeypatch):
    monkeypatch.setenv("EVL_CACHE_EXTRACT_LAYERS", "2,4")
    monkeypatch.setenv("EVL_CACHE_EXTRACT_LIMIT", "2")
    monkeypatch.setenv("EVL_CACHE_ROOT", "elsewhere")
    status, out, _ = run("extract", "--dataset", "list", "--list", "clips.txt", "--root", "videos", "--json")
    (cache,) = json.loads(out)["caches"]
    assert status == 0 and cache["clips"] == 2 and Path(cache["cache"]).parent == Path("elsewhere")
    assert json.loads(run("info", cache["cache"], "--json")[1])["spec"]["layers"] == [2, 4]


def test_a_clip_that_cannot_be_decoded_is_recorded_and_the_run_goes_on(work, run):
    Path("mixed").mkdir()
    for i in range(3):
        shutil.copy(f"videos/clip {i}.mp4", f"mixed/{i}.mp4")
    whole = Path("mixed/1.mp4").read_bytes()
    Path("mixed/1.mp4").write_bytes(whole[:100])
    Path("mixed.txt").write_text("0.mp4 a\n1.mp4 b\n2.mp4 b\n")
    args = "extract --dataset list --list mixed.txt --root mixed --cache caches/mixed".split()
    status, out, err = run(*args)
    assert status == 3 and "3 clips, 1 failed" in out
    assert "failed: 1.mp4: " in err and "cannot be decoded" in err
    assert "1 clips failed; see evl-cache info --failures caches/mixed, mend" in err.splitlines()[-1]

    found = json.loads(run("info", "caches/mixed", "--json")[1])
    assert (found["clips_done"], found["clips_failed"], found["is_complete"]) == (2, 1, True)
    assert found["failures"][0]["clip"] == "1.mp4"
    assert "1 failed" in run("info", "caches/mixed")[1]

    Path("held.txt").write_text("2.mp4\n")
    train = "train --cache caches/mixed --val-clips held.txt --head decoder1 --epochs 1 --out runs/mixed --json".split()
    status, out, _ = run(*train)
    assert status == 0 and json.loads(out)["val_clips"] == 1

    assert run(*args)[0] == 3  # still recorded, not tried again
    Path("mixed/1.mp4").write_bytes(whole)
    assert run(*args)[0] == 3
    status, out, _ = run(*args, "--retry-failed")
    assert status == 0 and "3 clips, 0 failed" in out


def test_a_run_from_an_official_checkpoint_scores_a_cache(work, run, monkeypatch):
    monkeypatch.setenv("EVL_CACHE_EXTRACT_FRAMES", "4")
    assert run(*EXTRACT_LIST)[0] == 0
    status, out, _ = run("import-head", str(OFFICIAL), "--out", "runs/official")
    assert status == 0 and "decoder of 4 layers, 2 heads, width 128, 4 frames, 5 classes" in out
    status, out, _ = run("eval", "--cache", "caches/mine", "--run", "runs/official", "--json")
    assert status == 0 and json.loads(out)["val_clips"] == 10
    assert "holds a run already" in error_of(run("import-head", str(OFFICIAL), "--out", "runs/official"), 2)


# Mistakes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            "extract --dataset folder --root clips --model ViT-B-17",
            "unknown model 'ViT-B-17'; expected an open_clip name",
        ),
        ("extract --dataset folder --root clips --pretrained x.pt", "'x.pt' is neither a file nor a tag"),
        (
            "extract --dataset folder --root clips --layers 3-5",
            "layers [3, 4, 5]; this tower has layers 1 to 4",
        ),
        ("extract --dataset folder --root clips --layers 4-3", "runs backwards"),
        ("extract --dataset folder --root clips --views 3", "expected temporal x spatial, such as 3x1"),
        ("extract --dataset folder --root clips --views 1x2", "expected 1 (centre) or 3"),
        ("extract --dataset folder --root clips --frames 0", "frames is 0; expected at least 1"),
        ("extract --dataset folder --root clips --sampling tsn --stride 4", "TSN takes no stride"),
        ("extract --dataset folder --root clips --batch 0", "batch"),
        ("extract --dataset folder --root clips --cache caches/x", "name one with --split"),
        ("extract --dataset folder --root clips --device cuda:99", "this machine has"),
        ("extract --dataset folder --root clips --device gpu", "expected cpu, cuda or cuda:N"),
        ("extract --dataset folder --root nowhere", "no such folder"),
        ("extract --dataset kinetics --root clips", "unknown data set 'kinetics'; expected one of k400"),
        ("extract --dataset kinetics", "unknown data set 'kinetics'; expected one of k400"),
        ("extract --dataset list --root videos", "expected --list FILE"),
        ("extract --dataset list --list nothing.txt --root videos", "nothing.txt: cannot be read"),
        (
            "extract --dataset list --list clips.txt --root clips",
            "10 of 10 clips (100 %) are missing under clips",
        ),
        ("extract", "Missing option '--dataset'; see evl-cache extract --help"),
        (
            "extract --dataset folder --frames many",
            "'many' is not a valid integer; see evl-cache extract --help",
        ),
        ("extract --dataset folder --tokens int4", "'int4' is not one of 'int8', 'fp16'"),
        ("extract --datset folder", "No such option"),
        ("exract", "No such command 'exract'"),
        ("train --head decoder4", "no caches under"),
        ("train --dataset k400 --cache caches/mine", "expected one of them at most"),
        (
            "train --dataset folder",
            "no caches of folder under caches; run evl-cache extract --dataset folder",
        ),
        ("train --cache x", "without --val-cache"),
        ("eval --cache caches/x", "Missing option '--run'"),
        ("import-head nothing.pth --out runs/x", "nothing.pth: no such file"),
        ("import-head clips.txt --out runs/x", "cannot be read as a checkpoint"),
    ],
)
def test_wrong_use_is_one_line_and_exit_status_2(work, run, args, message):
    assert message in error_of(run(*args.split()), 2)
    assert not Path("caches").exists() and not Path("runs").exists()


def test_a_list_line_without_a_label_is_named(work, run):
    Path("bad.txt").write_text("clip 0.mp4 left\nclip\n")
    message = error_of(run(*"extract --dataset list --list bad.txt --root videos".split()), 2)
    assert "bad.txt, line 2: 'clip' has no label; expected 'path label'" in message
    Path("bad.txt").write_text("\n")
    message = error_of(run(*"extract --dataset list --list bad.txt --root videos".split()), 2)
    assert "bad.txt" in message and "no clip" in message


def test_what_is_not_there_is_exit_status_1(work, run):
    assert "nothing: no cache here" in error_of(run("info", "nothing"), 1)
    assert "nothing: no cache here" in error_of(run("eval", "--cache", "nothing", "--run", "runs/x"), 1)


def test_a_deeper_head_than_cached_layers(work, run, monkeypatch):
    monkeypatch.setenv("EVL_CACHE_EXTRACT_MODEL", "deep-tower.json")
    assert run(*EXTRACT_LIST, "--layers", "8-12", "--limit", "4")[0] == 0
    train = "train --cache caches/mine --val-cache caches/mine --head decoder6".split()
    message = error_of_last_line(run(*train), 2)
    assert (
        "decoder6 reads 6 layers, the cache has 5 [8, 9, 10, 11, 12]; use decoder5, or extract more"
        in message
    )


def test_a_cache_for_other_frames_than_the_head(work, run):
    assert run(*EXTRACT_LIST, "--limit", "2")[0] == 0
    assert run("import-head", "k400_vitb16_8f_dec4x768.pth", "--out", "runs/official")[0] == 0
    message = error_of(run("eval", "--cache", "caches/mine", "--run", "runs/official"), 2)
    assert "its head needs frames 4, not 8 of the cache" in message


def test_clips_that_are_not_in_the_cache_or_no_text(work, run):
    assert run(*EXTRACT_LIST, "--limit", "2")[0] == 0
    Path("names.txt").write_text("clip 1.mp4\nclip 9.mp4\n")
    train = "train --cache caches/mine --val-clips names.txt --head decoder1".split()
    assert "'clip 9.mp4' is no clip of the cache" in error_of(run(*train), 2)
    Path("names.txt").write_bytes(b"\xff\xfe\x00")
    assert "names.txt: not UTF-8 text" in error_of(run(*train), 2)
    Path("names.txt").unlink()
    assert "names.txt" in error_of(run(*train), 2)


def test_no_network_for_a_tag_is_exit_status_1_with_ways_out(work, run, monkeypatch):
    import open_clip

    config = json.loads(DEMO_TOWER.read_text())
    monkeypatch.setattr(
        open_clip, "get_model_config", lambda name: {**config, "quick_gelu": name.endswith("quickgelu")}
    )

    def no_network(*args, **options):
        raise OSError("name or service not known\nmore")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", no_network)
    args = "extract --dataset folder --root clips --pretrained openai --model".split()
    message = error_of(run(*args, "ViT-B-32-quickgelu"), 1)
    assert (
        "'openai' of ViT-B-32-quickgelu could not be downloaded" in message and "--pretrained FILE" in message
    )
    assert "use --model ViT-B-32-quickgelu" in error_of(run(*args, "ViT-B-32"), 2)


def test_a_traceback_is_shown_only_where_it_is_asked_for(work, run):
    args = "extract --dataset folder --root nowhere".split()
    error_of(run(*args), 2)
    status, _, err = run(*args, "--debug")
    assert status == 2
    assert "Traceback (most recent call last)" in err and err.splitlines()[-1].startswith("error: ")
    error_of(run(*args), 2)


def test_a_place_that_cannot_be_written_is_one_line(work, run):
    Path("caches").write_text("a file")
    message = error_of_last_line(run(*EXTRACT_LIST, "--limit", "1"), 1)
    assert "caches" in message


# Help


def test_help_imports_no_torch_and_answers_within_a_second():
    code = (
        "import sys\nfrom evl_cache_cli.main import main\ntry:\n    main({args})\nexcept SystemExit as stop:\n"
        "    assert not stop.code\nheavy = {{'torch', 'numpy', 'zarr', 'open_clip', 'decord'}} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    seconds = []
    for args in (["--help"], ["--version"], ["extract", "--help"], ["train", "--help"]):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code.format(args=args)], **SUBPROCESS)
        seconds.append(time.monotonic() - started)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 1.0


@pytest.mark.parametrize("width", [80, 110])
@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_each_commands_help_fits_a_screen(name, width):
    result = CliRunner().invoke(cli, [*([name] if name else []), "--help"], terminal_width=width)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 110
    if name is not None:
        assert "Examples:" in lines and "--debug" in result.output


def test_no_arguments_show_the_commands(run):
    status, out, err = run()
    assert status == 2 and "Usage: evl-cache" in out + err
    assert all(name in out + err for name in COMMANDS)


def examples(name: str) -> list[list[str]]:
    command = cli.get_command(None, name)
    return [shlex.split(line) for line in command.examples]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name, work):
    found = examples(name)
    assert found
    for line in found:
        program, called, *args = line
        assert program == "evl-cache" and called in COMMANDS
        # Of the group, as in a run: a command remembers the names of its help option from its first context.
        group = cli.make_context("evl-cache", [], resilient_parsing=True)
        cli.get_command(None, called).make_context(called, args, parent=group)


def test_every_example_runs(work, run, monkeypatch):
    monkeypatch.setenv("EVL_CACHE_EXTRACT_STRIDE", "1")
    monkeypatch.setenv("EVL_CACHE_TRAIN_EPOCHS", "2")
    monkeypatch.setenv("EVL_CACHE_SWEEP_EPOCHS", "2")
    ran = 0
    # In this order each finds what the one before it made. The demo takes minutes: `make demo` runs it.
    order = ["extract", *(name for name in COMMANDS if name not in ("extract", "demo"))]
    for name in order:
        for line in examples(name):
            # tests/caches/test_sharing.py has servers of its own; tests/report/test_report.py has runs to compare.
            if name == "report" or any(word.startswith(ELSEWHERE) for word in line):
                continue
            if name == "render":  # whole benchmarks: below
                line = [*line, "--train-clips", "1", "--val-clips", "1"]
            with monkeypatch.context() as local:
                if {"8-12", "9-12"} & set(line):
                    local.setenv(f"EVL_CACHE_{name.upper()}_MODEL", "deep-tower.json")
                if "list" in line:  # as the checkpoint that import-head's example names
                    local.setenv("EVL_CACHE_EXTRACT_FRAMES", "4")
                result = run(*line[1:])
            assert result[0] == 0, (line, result)
            ran += 1
    assert ran >= 10


@pytest.mark.soak
def test_the_examples_of_render_draw_whole_benchmarks(work, run):
    for line in examples("render"):
        status, out, _ = run(*line[1:])
        assert status == 0
        root = Path(line[line.index("--root") + 1])
        assert out.startswith(f"{root}: {len(list(root.rglob('*.mp4')))} clips of ")
