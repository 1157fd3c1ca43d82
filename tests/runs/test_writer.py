"""A run directory has one writer: begun together, killed, on another machine, paused, beside a sweep."""

import errno
import json
import os
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from evl_cache.errors import EvlCacheError, UsageError
from evl_cache.runs import RunFile, new_run_directory, read_run_config
from evl_cache.runs.import_head import import_head
from evl_cache.runs.writer import writing
from evl_cache.store import LockWatcher, lock_holder
from evl_cache.sweep import sweep
from evl_cache.sweep.grid import expand
from evl_cache.train.stage import TrainOptions, train
from tests.support.clocks import Clock
from tests.support.example_data import OFFICIAL, ROOT
from tests.support.feature_caches import write_pair
from tests.support.lying_disk import NO_HARD_LINKS, Fault, lying_disk, needs_lying_disks
from tests.support.store_helpers import wait_until
from tests.support.warm_python import warm_python

OPTIONS = TrainOptions(head="linear", epochs=2, batch=4)
HERE = f"process {os.getpid()} on "

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("caches"))


def leave_lock(out, **changed):
    """Leave the lock of a process of another machine in a directory. Returns: its path."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "writer.lock"
    lock = LockWatcher(out).take_named("writer")
    holder = json.loads(path.read_bytes()[20:])
    lock.release()
    path.write_bytes(
        b"0" * 20 + json.dumps(holder | {"machine": "another", "host": "node7"} | changed).encode()
    )
    return path


def beat(path):
    content = path.read_bytes()
    path.write_bytes(f"{int(content[:20]) + 1:020d}".encode() + content[20:])


def start_training(caches, *options, cwd):
    command = [warm_python(), "-m", "evl_cache_cli", "train", "--cache", str(caches[0].path)]
    command += ["--val-cache", str(caches[1].path), "--head", "linear", "--batch", "4", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def steps(run):
    return [json.loads(line)["step"] for line in (run / RunFile.STEPS).read_text().splitlines()]


def test_of_two_trainings_with_one_directory_exactly_one_wins(caches, tmp_path):
    started = [start_training(caches, "--out", "run", "--epochs", "20", cwd=tmp_path) for _ in range(2)]
    ended = [(*process.communicate(timeout=100), process.returncode) for process in started]
    assert sorted(status for *_, status in ended) == [0, 2], ended
    (error,) = [err.splitlines()[-1] for _, err, status in ended if status == 2]
    assert "is writing there; wait for its end" in error or "holds a run already" in error
    assert steps(tmp_path / "run") == list(range(1, 81))
    assert not list((tmp_path / "run").glob(".*")) and not (tmp_path / "run" / "writer.lock").exists()


def test_trainings_without_a_directory_get_one_each(caches, tmp_path):
    started = [start_training(caches, "--epochs", "1", cwd=tmp_path) for _ in range(4)]
    ended = [(*process.communicate(timeout=100), process.returncode) for process in started]
    assert [status for *_, status in ended] == [0] * 4, ended
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == [f"{caches[0].name}-linear-{number}" for number in (1, 2, 3, 4)]
    assert all(steps(tmp_path / "runs" / name) == [1, 2, 3, 4] for name in names)


def test_ten_that_choose_at_once_get_ten_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    together, found = threading.Barrier(10), []

    def choose():
        together.wait()
        found.append(new_run_directory("cache", "head"))

    threads = [threading.Thread(target=choose) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(Path("runs") / f"cache-head-{number}" for number in range(1, 11))


def test_a_second_writer_is_told_who_the_first_is(caches, tmp_path):
    with writing(tmp_path / "run"):
        for resume in (False, True):
            with pytest.raises(
                UsageError, match=f"{HERE}.*is writing there; wait for its end, stop it, or use"
            ):
                train(*caches, options=OPTIONS, out=tmp_path / "run", resume=resume)
        with pytest.raises(UsageError, match=HERE):
            import_head(OFFICIAL, tmp_path / "run")
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["writer.lock"]
    train(*caches, options=OPTIONS, out=tmp_path / "run")
    assert not (tmp_path / "run" / "writer.lock").exists()


def test_a_sweep_and_its_runs_have_one_writer(caches, tmp_path):
    runs = expand([{"head": ["linear", "meanpool"], "epochs": 1, "batch": 4}], {"device": "cpu"})
    member = tmp_path / "sweep" / "runs" / runs[0].name
    for held in (tmp_path / "sweep", member):
        with writing(held), pytest.raises(UsageError, match=HERE):
            sweep(*caches, runs=runs, out=tmp_path / "sweep")
    sweep(*caches, runs=runs, out=tmp_path / "sweep")
    with writing(tmp_path / "sweep"), pytest.raises(UsageError, match=HERE):
        train(*caches, options=runs[0].options, out=member, resume=True)
    assert not list(tmp_path.rglob("*.lock"))


def test_a_killed_training_is_resumed_at_once_on_its_machine(caches, tmp_path):
    process = start_training(caches, "--out", "run", "--epochs", "4000", cwd=tmp_path)
    run = tmp_path / "run"
    wait_until((run / RunFile.STATE).exists, what="a state", timeout_s=60)
    holder = lock_holder(run, "writer")
    assert holder is not None and holder.is_alive
    os.kill(holder.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    holder = lock_holder(run, "writer")
    assert holder is not None and holder.is_alive is False
    for left in (f".tmp-node7-12-{'a' * 16}", f".writer.lock-{'a' * 16}"):
        (run / left).write_bytes(b"left by a writer that was killed while it wrote")
    (run / ".mine").write_bytes(b"somebody else's")
    waited = []
    with writing(run, on_wait=waited.append):
        assert [path.name for path in run.glob(".*")] == [".mine"]
    assert read_run_config(run).head == "linear" and not waited


def test_a_writer_of_another_machine_that_lives_is_left_alone(tmp_path):
    path = leave_lock(tmp_path / "run", pid=77)
    clock, waited = Clock(), []
    clock.at_look = lambda: beat(path) if clock.now > 5 else None
    refused = pytest.raises(UsageError, match="process 77 on node7 is writing there")
    with refused, writing(tmp_path / "run", on_wait=waited.append, runtime=clock):
        pass
    assert clock.now < 10 and path.exists()
    assert len(waited) == 1 and "process 77 on node7 was writing there; seeing for up to 60 s" in waited[0]


def test_a_writer_of_another_machine_that_stands_still_is_replaced(tmp_path):
    """Of many dead writers too, as a sweep's node leaves them, the wait is one."""
    for place in ("run", "a", "b"):
        leave_lock(tmp_path / place)
    clock = Clock()
    beside = [tmp_path / "a", tmp_path / "b"]
    with writing(tmp_path / "run", beside=beside, runtime=clock) as writer:
        writer.check()
    assert 60 <= clock.now < 70 and not list(tmp_path.rglob("*.lock"))


def test_a_writer_that_was_replaced_writes_nothing_more(caches, tmp_path):
    """As after a long pause: another machine has seen the lock stand still."""
    run = tmp_path / "run"

    def on_step(done, total, loss):
        if done == 2:
            (run / "writer.lock").unlink()
            leave_lock(run, pid=77)

    with pytest.raises(EvlCacheError, match="process 77 on node7 took this run over"):
        train(*caches, options=OPTIONS, out=run, on_step=on_step)
    assert not (run / RunFile.STATE).exists() and not (run / RunFile.HEAD).exists()
    assert (run / "writer.lock").exists()


def test_the_steps_of_a_replaced_writer_do_not_mix_with_its_successors(caches, tmp_path):
    late = []

    def on_step(done, total, loss):
        if done == 5:
            late.append((tmp_path / "run" / RunFile.STEPS).open("a"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(*caches, options=OPTIONS, out=tmp_path / "run", on_step=on_step)
    train(*caches, options=OPTIONS, out=tmp_path / "run", resume=True)
    with late[0] as file:
        file.write("of the replaced one\n")
    assert steps(tmp_path / "run") == list(range(1, 9))


def test_a_directory_that_nothing_was_written_to_goes_again(caches, tmp_path):
    with pytest.raises(UsageError, match="no run there"):
        train(*caches, options=OPTIONS, out=tmp_path / "not" / "there", resume=True)
    assert not (tmp_path / "not").exists()
    process = start_training(caches, "--no-temporal-conv", cwd=tmp_path)
    assert "linear has no" in process.communicate(timeout=60)[1] and process.returncode == 2
    assert not list((tmp_path / "runs").iterdir())


def test_a_full_disk_leaves_the_last_state_and_says_what_to_do(caches, tmp_path):
    code = """
import resource, signal, sys, torch
from pathlib import Path
from evl_cache.errors import EvlCacheError
from evl_cache.heads import build_head
from evl_cache.runs import save_head, save_state, write_json
from evl_cache.runs.directory import load_state

out = Path(sys.argv[1])
save_state(out, {"step": 1})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
head = build_head("linear", num_layers=1, width=1024, num_frames=1, grid=(1, 1), num_classes=100, num_heads=None, dropout=0.0)
for write in (
    lambda: save_state(out, {"step": 2, "weights": torch.zeros(1 << 20)}),
    lambda: save_head(out, head),
    lambda: write_json(out / "result.json", {"text": "x" * (1 << 20)}),
):
    try:
        write()
    except EvlCacheError as error:
        assert "File too large" in str(error) and str(out) in str(error), error
        assert str(error).endswith("(a training with --resume)"), error
    else:
        sys.exit("no error")
assert load_state(out) == {"step": 1}
assert [path.name for path in out.iterdir()] == ["last.pt"]
"""
    done = subprocess.run(
        [warm_python(), "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["silly names", "no hard links", "slow attributes"])
def test_a_run_on_a_network_disk_has_one_writer_and_leaves_nothing(caches, tmp_path, kind):
    needs_lying_disks()
    seconds = 5 if kind == "slow attributes" else 0
    with lying_disk(tmp_path / "backing", tmp_path / "disk", attributes_s=seconds) as disk:
        disk.set(*[NO_HARD_LINKS] * (kind == "no hard links"), silly_rename=kind == "silly names")
        run = disk.path / "run"
        train(*caches, options=OPTIONS, out=run)
        with writing(run), pytest.raises(UsageError, match=HERE):
            train(*caches, options=OPTIONS, out=run, resume=True)
        train(*caches, options=OPTIONS, out=run, resume=True)
        assert steps(run) == list(range(1, 9))
        assert not list(run.glob("*.lock"))
        # Such a disk hears of a file's last close later than its program goes on: until then it keeps a silly name.
        wait_until(lambda: not list(run.glob(".*")), what="nothing else is left")


def test_a_disk_that_fails_while_the_state_is_kept_ends_the_run_which_goes_on_later(caches, tmp_path):
    needs_lying_disks()
    with lying_disk(tmp_path / "backing", tmp_path / "disk") as disk:
        run, options = disk.path / "run", replace(OPTIONS, save_every_steps=3)

        def on_step(done, total, loss):
            if done == 5:
                disk.set(Fault("write", errno.ENOSPC, times=None, under="run"))

        with pytest.raises(
            EvlCacheError,
            match=r"cannot write .*(last.pt|steps.jsonl): No space left on device; free space or check",
        ):
            train(*caches, options=options, out=run, on_step=on_step)
        disk.clear()
        train(*caches, options=options, out=run, resume=True)
        assert steps(run) == list(range(1, 9))
