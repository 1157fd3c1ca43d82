"""Random options of stage two's commands: each set ends in a result, or in one line with exit 2, and all JSON is strict."""

import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from evl_cache.runs.finite import not_finite
from evl_cache.untrusted.json_text import parse_json
from evl_cache_cli.main import main
from tests.support.feature_caches import write_pair

SETS = int(os.environ.get("EVL_CACHE_FUZZ_SETS", "36"))
HUGE = "1000000000000000000000000000000"
WEIRD = ["nan", "inf", "-inf", "-1", "0", "1e30", "1e-30", "1e400", HUGE, "x", "", " ", "0x10", "1,2", "٣"]
COUNTS = ["1", "2", "3", "-1", "0", HUGE, "1.5", "x", ""]
SHARES = ["0", "0.1", "0.5", "0.99", "1", *WEIRD]
# Option -> values of which most work, so that combinations get far.
TRAIN = {
    "--head": ["decoder1", "decoder2", "linear", "meanpool", "mlap", "decoder9", "decoder0", "x", ""],
    "--head-layers": ["2", "3-4", "2,4", "4-2", "9", "x", ""],
    "--epochs": ["1", "2", "1", "2", "0", "-1", "x", "1.5"],
    "--steps": ["1", "3", "5", "0", "-1", "x"],
    "--batch": ["2", "4", "16", "auto", "0", "-4", HUGE, "x"],
    "--accumulate": COUNTS,
    "--lr": ["1e-3", "1e-2", "1e3", "1e12", "1e30", *WEIRD],
    "--warmup-steps": ["0", "2", HUGE, *COUNTS],
    "--weight-decay": ["0", "0.05", "5", "1e10", *WEIRD],
    "--grad-clip": ["1", "1e-9", *WEIRD],
    "--dropout": SHARES,
    "--label-smoothing": SHARES,
    "--ema": ["0.9", "0.999", *SHARES],
    "--precision": ["float32", "bfloat16", "float16", "tf32", "x", ""],
    "--seed": ["0", "7", "18446744073709551615", "18446744073709551616", "-1", HUGE, "x"],
    "--order-seed": ["0", "7", "-1", "18446744073709551616", "x"],
    "--save-every-steps": COUNTS,
    "--cache-in-ram": ["1", "0.000001", *WEIRD],
    "--shuffle-blocks": ["0", "1", *COUNTS],
    "--read-threads": ["1", "2", "0", "-1", "x"],
    "--rank-timeout": ["10", *WEIRD],
    "--device": ["cpu", "cpu:0", "cpu:1", "cuda", "cuda:7", "mps", "meta", "x", ""],
}
SWITCHES = [
    "--no-temporal-conv",
    "--no-temporal-pos-embed",
    "--no-temporal-cross-attention",
    "--no-decay-norms-and-biases",
    "--trust",
    "--json",
    "--cuda-graph",
]
SWEEP = {
    **{
        name: TRAIN[name]
        for name in (
            "--head",
            "--lr",
            "--weight-decay",
            "--dropout",
            "--seed",
            "--epochs",
            "--steps",
            "--batch",
            "--warmup-steps",
            "--label-smoothing",
            "--ema",
            "--grad-clip",
            "--precision",
            "--save-every-steps",
            "--cache-in-ram",
            "--read-threads",
            "--device",
        )
    },
    "--head": ["linear", "decoder1,linear", "decoder2", "x"],
    "--lr": ["1e-3", "1e-3,1e30", "nan,1e-3", "inf", "x"],
    "--seed": ["0", "0,1", "-1", "0,18446744073709551616"],
    "--temporal": ["all", "none", "all,none", "x"],
    "--memory": ["1", *WEIRD],
}
EVAL = {name: TRAIN[name] for name in ("--batch", "--precision", "--read-threads", "--device")}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("caches"))


@pytest.fixture
def call(capsys):
    """Run a command as the console script does. Gives its exit status, stdout and stderr."""

    def run(words):
        environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
        capsys.readouterr()
        status = None
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        finally:
            signal.signal(signal.SIGTERM, handler)
            os.environ.clear()
            os.environ.update(environment)
        return (status, *capsys.readouterr())

    return run


def drawn(rng, table, switches=()):
    names = rng.sample(sorted(table), rng.choice([1, 2, 3, 4]))
    # The first values of each are usual ones.
    values = [rng.choice(table[name][: 2 if rng.random() < 0.7 else None]) for name in names]
    words = [word for pair in zip(names, values, strict=True) for word in pair]
    return [*words, *rng.sample(list(switches), min(len(switches), rng.choice([0, 0, 1, 2])))]


def check_files(folder):
    for path in Path(folder).rglob("*"):
        if path.suffix == ".json":
            parse_json(path.read_bytes())
        if path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                parse_json(line)
        if path.name == "last.pt":
            assert not_finite(torch.load(path, weights_only=True)) is None, path


def check_end(ended, words):
    status, out, err = ended
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status in (0, 2, 3), (words, ended)
    assert len(told) == (status == 2) and "Traceback" not in err, (words, ended)
    assert not re.search(r"\bnan\b(?! or infinite)|\binf\b", out, re.IGNORECASE), (words, ended)
    if "--json" in words and status in (0, 3):
        parse_json(out)


def fitting(words):
    """A head that the cache's three layers fit, and a short length, where none is drawn: the defaults are others."""
    head = [] if "--head" in words else ["--head", "decoder2"]
    return head + ([] if {"--epochs", "--steps"} & set(words) else ["--epochs", "1"])


@pytest.mark.parametrize("part", range(6))
def test_random_options_end_in_a_result_or_in_one_line(caches, tmp_path, call, part):
    rng = random.Random(1000 + part)
    both = ["--cache", caches[0].path, "--val-cache", caches[1].path]
    assert call(["train", *both, "--head", "linear", "--epochs", "1", "--out", tmp_path / "fine"])[0] == 0
    for number in range(SETS // 6):
        out = tmp_path / f"run-{number}"
        kind = rng.choice(["train", "train", "train", "sweep", "eval"])
        if kind == "eval":
            words = ["eval", "--cache", caches[1].path, "--run", tmp_path / "fine", *drawn(rng, EVAL)]
        else:
            mine = drawn(rng, *((TRAIN, SWITCHES) if kind == "train" else (SWEEP, ["--json"])))
            words = [kind, *both, *mine, *fitting(mine), "--out", out]
        check_end(call(words), words)
        check_files(tmp_path)
        if kind == "train" and out.exists():
            again = [*words, "--resume"]
            check_end(call(again), again)
            check_files(tmp_path)
        shutil.rmtree(out, ignore_errors=True)
