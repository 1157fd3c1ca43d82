"""The scripts of docs/cluster.md are run as they stand there, with a stand-in for SLURM and several local ranks."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from evl_cache.rendered import DEMO_CLASSES
from evl_cache.store import verify_cache
from evl_cache_cli.main import cli, main
from tests.support.doc_blocks import blocks
from tests.support.example_data import DEEP_TOWER
from tests.support.servers import free_port
from tests.support.store_helpers import differences, one_thread, tree
from tests.support.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "cluster.md"
CLIPS = 130  # two blocks of 64, and one of 2
# SLURM's: a machine is a process group here. Every node is this one.
SRUN = """#!/bin/sh
for node in $(seq "$SLURM_NNODES"); do "$@" & pids="$pids $!"; done
status=0; for pid in $pids; do wait "$pid" || status=$?; done; exit $status
"""
SCONTROL = "#!/bin/sh\nfor node in $(seq $SLURM_NNODES); do echo 127.0.0.1; done\n"


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    """Tested blocks of the page by a word of theirs."""
    found = {}
    for block in blocks(PAGE):
        if block.tested_by is None:
            continue
        kind = next(word for word in ("srun", "--array", "--watch") if word in block.text)
        found[kind] = block.text
    assert len(found) == 3
    return found


@pytest.fixture(scope="module")
def data(motions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Kinetics tree of few videos under many names."""
    folder = tmp_path_factory.mktemp("sets")
    videos = [path for path in sorted(motions.glob("*.mp4")) if path.stat().st_size > 200]
    kinetics = folder / "k400"
    (kinetics / "annotations").mkdir(parents=True)
    for split, count in (("train", CLIPS), ("val", 4)):
        (kinetics / split).mkdir()
        rows = ["label,youtube_id,time_start,time_end,split"]
        for i in range(count):
            rows.append(f"{DEMO_CLASSES[i % 3]},{split}{i:06d},{i},{i + 10},{split}")
            (kinetics / split / f"{split}{i:06d}_{i:06d}_{i + 10:06d}.mp4").symlink_to(
                videos[i % len(videos)]
            )
        (kinetics / "annotations" / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SLURM's commands, torchrun and evl-cache."""
    folder = tmp_path_factory.mktemp("bin")
    python = f'#!/bin/sh\nexec "{warm_python()}" -m'
    for name, text in (
        ("srun", SRUN),
        ("scontrol", SCONTROL),
        ("torchrun", f'{python} torch.distributed.run "$@"\n'),
        ("evl-cache", f'{python} evl_cache_cli "$@"\n'),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def environment(data: Path, tools: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a user's shell would have, and what makes the published commands short on small clips."""
    tower = tmp_path_factory.mktemp("tower") / "tower.json"
    tower.write_text(json.dumps(DEEP_TOWER))
    return {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHON_EXEC": warm_python(),  # of torchrun's ranks
        "EVL_DATA_ROOT": str(data),
        "EVL_CACHE_EXTRACT_MODEL": str(tower),
        "EVL_CACHE_EXTRACT_PRETRAINED": "none",
        "EVL_CACHE_EXTRACT_STRIDE": "1",
        "EVL_CACHE_EXTRACT_DEVICE": "cpu",
        "EVL_CACHE_EXTRACT_DECODE_WORKERS": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
    }


@pytest.fixture(scope="module")
def alone(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of the caches that one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.chdir(folder)
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main(["extract", "--dataset", "k400", "--layers", "9-12"])
    assert not ended.value.code
    return tree(folder / "caches")


def check_whole(folder: Path, alone: dict[str, bytes]) -> None:
    assert differences(tree(folder / "caches"), alone) == []
    for cache in (folder / "caches").iterdir():
        assert verify_cache(cache).problems == ()


def test_the_sbatch_file_extracts_with_four_ranks_of_two_nodes(
    scripts: dict[str, str], environment: dict[str, str], alone: dict[str, bytes], tmp_path: Path
) -> None:
    script = scripts["srun"].replace(":29400", f":{free_port()}")
    done = subprocess.run(
        ["bash", "-e"],
        input=script,
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    shares = re.findall(r"process (\d) of 4: (\d+) of (\d+) clips", done.stderr)
    assert {rank for rank, _, _ in shares} == {"1", "2", "3"}  # the first tells the result
    assert done.stdout.count(f"{CLIPS} clips, 0 failed") == 1
    check_whole(tmp_path, alone)
    watch(scripts["--watch"], tmp_path)


def watch(script: str, folder: Path) -> None:
    """The page's line, from anywhere that sees the disk."""
    (pattern,) = re.findall(r"caches/\S+", script)
    (cache,) = folder.glob(pattern)
    words = script.replace(pattern, str(cache)).split()
    assert words.pop(0) == "evl-cache"
    told = CliRunner().invoke(cli, words)
    assert told.exit_code == 0 and told.output.startswith(
        f"{CLIPS} of {CLIPS} clips, 0 failed; blocks 3 of 3"
    )


def test_tasks_of_a_job_array_share_the_blocks_by_the_disk(
    scripts: dict[str, str], environment: dict[str, str], alone: dict[str, bytes], tmp_path: Path
) -> None:
    script = scripts["--array"]
    first, last = (int(number) for number in re.findall(r"--array=(\d+)-(\d+)", script)[0])
    tasks = [
        subprocess.Popen(
            ["bash", "-ec", script],
            cwd=tmp_path,
            env=os.environ | environment | {"SLURM_ARRAY_TASK_ID": str(task)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for task in range(first, last + 1)
    ]
    errors = [task.communicate(timeout=120)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0] * len(tasks), errors
    check_whole(tmp_path, alone)
