"""A sweep is its trainings: the same losses from one reading, whatever is killed, diverges or does not fit."""

import json
import math
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from benchmarks.support.counting import counted
from evl_cache import load_head
from evl_cache.errors import UsageError
from evl_cache.heads.decoder.chunked.chunks import walk
from evl_cache.heads.decoder.tensors import StoredMaps, StoredTokens
from evl_cache.heads.layer_tokens import LayerTokens, decoded_maps
from evl_cache.processes.stop_requests import Interrupted
from evl_cache.quantize import quantize_maps, quantize_tokens
from evl_cache.runs.evaluate import evaluate
from evl_cache.runs.intervals import wilson_interval
from evl_cache.store import Reads
from evl_cache.sweep import read_sweep, sweep
from evl_cache.sweep.grid import expand, read_grid
from evl_cache.sweep.memory import HeadMemory, split_passes
from evl_cache.train.head_reads import all_reads
from evl_cache.train.stage import TrainOptions, train
from evl_cache_cli.main import cli
from tests.support.feature_caches import write_pair

COMMON = {"epochs": 2, "batch": 4, "lr": 3e-3}
SIXTEEN = [
    {"head": ["decoder1", "decoder2", "decoder4"], "temporal": ["all", "none", "conv"]},
    {"head": "decoder2", "temporal": "no-cross-attention", "lr": 1e-2, "ema": 0.9},
    {"head": ["linear", "meanpool", "attentive", "mlap", "uniformerv2", "ladder"]},
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("caches"), layers=(1, 2, 3, 4))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run):
    return [line["loss"] for line in lines(run / "steps.jsonl")]


def weights(run):
    return load_head(run).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def small(seeds=(0,), heads=("decoder1", "linear"), **common):
    return expand([{"head": list(heads), "seed": list(seeds)}], {**COMMON, **common})


def test_sixteen_heads_lose_what_their_own_trainings_lose(caches, tmp_path):
    runs = expand(SIXTEEN, {**COMMON, "epochs": 1, "seed": 3})
    assert len(runs) == 16
    result = sweep(*caches, runs=runs, out=tmp_path / "sweep")
    assert [row.status for row in result.runs] == ["done"] * 16 and len(result.passes) == 1
    for run in runs:
        own = train(*caches, options=run.options, out=tmp_path / run.name)
        folder = tmp_path / "sweep" / "runs" / run.name
        assert losses(folder) == pytest.approx(losses(tmp_path / run.name), abs=1e-5), run.name
        row = next(row for row in result.runs if row.name == run.name)
        assert (row.top1, row.top5, row.parameters) == (own.top1, own.top5, own.parameters)
        for a, b in zip(
            lines(folder / "metrics.jsonl"), lines(tmp_path / run.name / "metrics.jsonl"), strict=True
        ):
            assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5)
        if run.options.head in ("decoder4", "linear"):
            assert evaluate(folder, caches[1]).top1 == own.top1
        mine, alone = (
            json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / run.name)
        )
        for config in (mine, alone):
            assert config["environment"].pop("date")
        assert mine == alone


def test_seeds_differ_in_dropout_and_start_but_not_in_the_clips_order(caches, tmp_path):
    runs = small(seeds=(4, 5), heads=("decoder2",))
    assert {run.options.order_seed for run in runs} == {4}
    sweep(*caches, runs=runs, out=tmp_path / "sweep")
    found = []
    for run in runs:
        train(*caches, options=run.options, out=tmp_path / run.name)
        found.append(losses(tmp_path / "sweep" / "runs" / run.name))
        assert found[-1] == pytest.approx(losses(tmp_path / run.name), abs=1e-5)
    assert found[0] != found[1]
    # With the order of its own seed a run is the plain one.
    train(*caches, options=replace(runs[0].options, order_seed=None), out=tmp_path / "plain")
    assert losses(tmp_path / "plain") == losses(tmp_path / runs[0].name)


def test_sixteen_heads_read_and_decode_what_one_does(caches, tmp_path, monkeypatch):
    grids = [
        {"head": "decoder4", "temporal": ["all", "none"], "lr": [1e-3, 3e-3], "seed": [0, 1, 2]},
        {"head": ["meanpool", "mlap", "uniformerv2", "ladder"]},
    ]
    runs = expand(grids, {**COMMON, "epochs": 1})
    assert len(runs) == 16
    alone, together = tmp_path / "alone", tmp_path / "sweep"
    monkeypatch.setattr("evl_cache.sweep.memory.head_memory", lambda *a, **k: HeadMemory(state=0, step=0))
    with counted() as one:
        train(*caches, options=runs[0].options, out=alone)
    with counted() as shared:
        sweep(*caches, runs=runs, out=together)
    samples = 13 + 5
    probed = caches[0].read_stored([0])  # one sample, to measure how much memory a head takes
    values = sum(t.codes[0].numel() for t in probed.tokens) + sum(m.codes[0].numel() for m in probed.maps)
    assert shared.decoded == samples * values  # once each; a head alone decodes in its backward pass too
    assert one.decoded >= shared.decoded
    assert 0 <= shared.read - one.read <= 16 * one.read / samples  # the probes


def test_decoding_once_gives_the_bits_that_a_head_decodes_for_itself():
    generator = torch.Generator().manual_seed(0)
    coded = quantize_tokens(torch.randn(3, 4, 13, 24, generator=generator) * 3)
    stored = StoredTokens(tokens=coded.codes, affine=coded.affine, token_scale=coded.scale)
    values = LayerTokens(coded).values
    for chunk in walk((3, 4), 1):
        out = torch.empty(chunk.size, 4, 3, 24)
        assert torch.equal(stored.load(chunk.tokens, out), values[:, :, chunk.tokens].permute(2, 1, 0, 3))
    maps = quantize_maps(torch.rand(2, 2, 3, 12, 12, generator=generator).softmax(-1))
    for dtype in (torch.float32, torch.bfloat16):
        rows = StoredMaps(maps=maps.codes, row_max=maps.row_max).load(
            1, slice(0, 12, 1), torch.empty(12, 3, 2, 12, dtype=dtype)
        )
        assert torch.equal(rows, decoded_maps(maps, dtype)[:, 1].permute(2, 1, 0, 3))


def test_low_precision_losses_are_those_of_the_own_training(caches, tmp_path):
    runs = small(heads=("decoder2", "mlap", "linear"), precision="bfloat16")
    sweep(*caches, runs=runs, out=tmp_path / "sweep")
    for run in runs:
        train(*caches, options=run.options, out=tmp_path / run.name)
        assert losses(tmp_path / "sweep" / "runs" / run.name) == pytest.approx(
            losses(tmp_path / run.name), abs=1e-5
        )


def test_a_diverging_head_ends_alone(caches, tmp_path):
    grids = [{"head": "decoder2", "lr": [3e-3, 1e12], "temporal": "none"}, {"head": "linear"}]
    runs = expand(grids, {**COMMON, "epochs": 3, "dropout": 0.0})
    result = sweep(*caches, runs=runs, out=tmp_path / "sweep")
    (bad,) = [row for row in result.runs if row.status == "diverged"]
    assert "1e+12" in bad.name and "training diverged" in (bad.error or "") and bad.top1 is None
    assert [row.status for row in result.runs if row is not bad] == ["done", "done"]
    good = runs[0]
    train(*caches, options=good.options, out=tmp_path / "own")
    assert losses(tmp_path / "sweep" / "runs" / good.name) == pytest.approx(
        losses(tmp_path / "own"), abs=1e-5
    )
    assert bad.group not in {group.group for group in result.groups}
    again = sweep(*caches, runs=runs, out=tmp_path / "sweep", resume=True)
    assert again.runs == result.runs and again.passes == ()


class Killed(Exception):
    pass


def killing(at_step):
    @contextmanager
    def progress(description):
        def on_step(done, total, heads):
            if done == at_step:
                raise Killed

        yield on_step

    return progress


@pytest.mark.parametrize(
    "killed_at", [1, 4, 5, 8]
)  # of 4 steps an epoch, states every 3: before any, between, at ends
def test_a_killed_sweep_goes_on_to_the_same_weights(caches, tmp_path, killed_at):
    runs = small(seeds=(0, 1), save_every_steps=3)
    whole = sweep(*caches, runs=runs, out=tmp_path / "whole")
    with pytest.raises(Killed):
        sweep(*caches, runs=runs, out=tmp_path / "cut", progress=killing(killed_at))
    assert {row.status for row in read_sweep(tmp_path / "cut").runs} == {"waiting"}
    result = sweep(*caches, runs=runs, out=tmp_path / "cut", resume=True)
    assert [(r.name, r.top1, r.status) for r in result.runs] == [
        (r.name, r.top1, r.status) for r in whole.runs
    ]
    for run in runs:
        a, b = (tmp_path / which / "runs" / run.name for which in ("whole", "cut"))
        assert losses(a) == losses(b) and same(weights(a), weights(b))


def test_heads_that_were_kept_at_different_steps_meet_again(caches, tmp_path, monkeypatch):
    """A kill between two heads' states leaves one further than the other."""
    import evl_cache.train.run_output as module

    runs = small()
    sweep(*caches, runs=runs, out=tmp_path / "whole")
    real, saved = module.save_state, []

    def save_twice(out, state):
        saved.append(out)
        if len(saved) == 2:  # the second head's first state
            raise Killed
        real(out, state)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_state", save_twice)
        with pytest.raises(Killed):
            sweep(*caches, runs=runs, out=tmp_path / "cut")
    sweep(*caches, runs=runs, out=tmp_path / "cut", resume=True)
    for run in runs:
        a, b = (tmp_path / which / "runs" / run.name for which in ("whole", "cut"))
        assert losses(a) == losses(b) and same(weights(a), weights(b))


def test_a_signal_keeps_every_state(caches, tmp_path, monkeypatch):
    import evl_cache.sweep.stage as module

    stops = []

    class Noted(module.StopRequests):
        def __init__(self):
            super().__init__()
            stops.append(self)

    @contextmanager
    def progress(description):
        def on_step(done, total, heads):
            if done == 3:
                stops[-1].signal_number = 15

        yield on_step

    monkeypatch.setattr(module, "StopRequests", Noted)
    runs = small()
    with pytest.raises(Interrupted, match="stopped after step 3 of a pass of 2 heads"):
        sweep(*caches, runs=runs, out=tmp_path / "cut", progress=progress)
    monkeypatch.undo()
    torch.set_num_threads(1)
    sweep(*caches, runs=runs, out=tmp_path / "cut", resume=True)
    sweep(*caches, runs=runs, out=tmp_path / "whole")
    for run in runs:
        a, b = (tmp_path / which / "runs" / run.name for which in ("whole", "cut"))
        assert losses(a) == losses(b)


def test_heads_that_do_not_fit_together_are_trained_in_turn(caches, tmp_path):
    runs = small(seeds=(0, 1), heads=("decoder2", "mlap"))
    whole = sweep(*caches, runs=runs, out=tmp_path / "whole")
    narrow = sweep(*caches, runs=runs, out=tmp_path / "narrow", memory_bytes=1)
    assert [len(part) for part in whole.passes] == [4] and [len(part) for part in narrow.passes] == [1] * 4
    assert [(r.name, r.top1) for r in whole.runs] == [(r.name, r.top1) for r in narrow.runs]
    for run in runs:
        a, b = (tmp_path / which / "runs" / run.name for which in ("whole", "narrow"))
        assert losses(a) == pytest.approx(losses(b), abs=1e-5)


def test_passes_are_as_large_as_memory_lets_them_be():
    needs = {"a": (10, 5), "b": (10, 50), "c": (10, 5), "d": (200, 5), "e": (10, 5)}

    def memory(name):
        return HeadMemory(state=needs[name][0], step=needs[name][1])

    assert split_passes("abcde", memory, room=1000, shared=100) == [list("abcde")]
    assert split_passes("abcde", memory, room=185, shared=100) == [["a", "b", "c"], ["d"], ["e"]]
    assert split_passes("abcde", memory, room=1, shared=100) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert split_passes([], memory, room=1, shared=1) == []


def test_runs_of_other_batches_are_other_passes(caches, tmp_path):
    runs = expand([{"head": "linear", "batch": [4, 8], "lr": [1e-3, 1e-2]}], {"epochs": 1})
    result = sweep(*caches, runs=runs, out=tmp_path / "sweep")
    assert sorted(len(part) for part in result.passes) == [2, 2]
    assert {row.name for row in result.runs} == {
        f"linear_lr={lr}_batch={b}" for lr in ("0.001", "0.01") for b in (4, 8)
    } or {row.name for row in result.runs} == {
        f"linear_batch={b}_lr={lr}" for lr in ("0.001", "0.01") for b in (4, 8)
    }


def test_accumulated_passes_lose_what_their_trainings_lose(caches, tmp_path):
    runs = small(heads=("decoder2", "linear"), accumulate=2)
    sweep(*caches, runs=runs, out=tmp_path / "sweep")
    for run in runs:
        train(*caches, options=run.options, out=tmp_path / run.name)
        assert losses(tmp_path / "sweep" / "runs" / run.name) == pytest.approx(
            losses(tmp_path / run.name), abs=1e-5
        )


def test_the_table_is_sorted_and_has_mean_and_deviation_over_seeds(caches, tmp_path):
    result = sweep(*caches, runs=small(seeds=(0, 1, 2), heads=("linear", "meanpool")), out=tmp_path / "sweep")
    assert [group.runs for group in result.groups] == [3, 3]
    assert result.groups[0].top1 >= result.groups[1].top1
    for group in result.groups:
        found = [row.top1 for row in result.runs if row.group == group.group]
        mean = sum(found) / 3
        assert group.top1 == pytest.approx(mean)
        assert group.deviation == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in found) / 2))
        assert group.top1_interval is None
    assert read_sweep(tmp_path / "sweep") == result


def test_one_run_has_the_interval_of_its_clips_in_the_table_and_in_the_file(caches, tmp_path):
    result = sweep(*caches, runs=small(heads=("linear",)), out=tmp_path / "sweep")
    (group,), (row,) = result.groups, result.runs
    assert group.top1_interval == row.top1_interval == wilson_interval(row.top1, 5)
    assert group.deviation is None and row.val_clips == 5
    assert read_sweep(tmp_path / "sweep") == result
    content = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    for part in ("runs", "groups"):  # as earlier versions wrote it
        for values in content[part]:
            del values["top1_interval"]
            values.pop("val_clips", None)
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(content))
    assert read_sweep(tmp_path / "sweep").groups[0].top1 == group.top1


def test_a_sweep_does_not_go_on_with_other_caches_or_clips(caches, tmp_path):
    runs = small(seeds=(0, 1), heads=("linear",))
    sweep(*caches, runs=runs, out=tmp_path / "sweep")
    shutil.rmtree(tmp_path / "sweep" / "runs" / runs[1].name)
    others = write_pair(tmp_path / "other", layers=(1, 2, 3, 4), codec="raw")
    with pytest.raises(UsageError, match="--resume with other train cache, val cache"):
        sweep(*others, runs=runs, out=tmp_path / "sweep", resume=True)
    with pytest.raises(UsageError, match="--resume with other val clips"):
        sweep(*caches, runs=runs, out=tmp_path / "sweep", resume=True, val_clips=[0, 1])
    assert sweep(*caches, runs=runs, out=tmp_path / "sweep", resume=True).groups[0].runs == 2


def test_values_that_are_nearly_equal_have_names_of_their_own():
    runs = expand([{"head": "linear", "lr": [1e-3, 0.00100000001]}], COMMON)
    assert len({run.name for run in runs}) == len({run.group for run in runs}) == 2
    assert runs[0].group == "linear lr=0.001"


# Grids


def test_a_grid_of_a_toml_file(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(
        'epochs = 5\n[[grid]]\nhead = ["decoder1", "decoder2"]\ntemporal = ["all", "none"]\nseed = [0, 1]\n'
        '[[grid]]\nhead = "linear"\nlr = [0.1, 1e-2]\nhead_layers = ["3,4", "4"]\n'
    )
    runs = expand(read_grid(path), {"batch": 8})
    assert len(runs) == 12 and len({run.name for run in runs}) == 12
    assert runs[0].options == TrainOptions(head="decoder1", epochs=5, batch=8, order_seed=0)
    assert runs[2].options == TrainOptions(
        head="decoder1",
        epochs=5,
        batch=8,
        order_seed=0,
        temporal_conv=False,
        temporal_pos_embed=False,
        temporal_cross_attention=False,
    )
    assert (runs[8].options.lr, runs[8].options.head_layers) == (0.1, (3, 4))
    path.write_text("lr = [1e-3, 1e-2]\n")
    assert [run.group for run in expand(read_grid(path), {})] == ["decoder4 lr=0.001", "decoder4 lr=0.01"]


def test_switches_that_a_head_lacks_make_no_other_run():
    runs = expand(
        [{"head": ["decoder1", "linear", "mlap"], "temporal": ["all", "none", "no-conv"]}], {"epochs": 1}
    )
    assert [run.group for run in runs] == [
        "decoder1",
        "decoder1 temporal=none",
        "decoder1 temporal=no-conv",
        "linear",
        "mlap",
        "mlap no-pos-embed",
    ]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"heads": "linear"}, "unknown axis 'heads' of a sweep; expected one of head, "),
        ({"order_seed": 1}, "unknown axis"),
        ({"device": "cpu"}, "unknown axis"),
        ({"head": "cubic"}, "unknown head 'cubic'"),
        ({"lr": "fast"}, "lr is 'fast'; expected float"),
        ({"epochs": 1.5}, "epochs is 1.5; expected int"),
        ({"seed": True}, "seed is True; expected int"),
        ({"temporal": "some"}, "temporal 'some'; expected one of all, none"),
        ({"temporal": [["all"]]}, r"temporal \['all'\]; expected one of all, none"),
        ({"batch": "auto"}, "give a sweep a number"),
        ({"lr": "auto"}, "lr is 'auto'; expected float"),
        ({"dropout": "auto"}, "dropout is 'auto'; expected float"),
        ({"seed": "auto"}, "seed is 'auto'; expected int"),
        ({"lr": [1e38, 1e-3]}, "expected at most 1e\\+37"),
        ({"lr": []}, "a sweep of no run"),
        ({"lr": -1.0}, "expected lr above 0"),
        ({"epochs": 3, "steps": 5}, "exactly one of them"),
    ],
)
def test_grids_that_cannot_be_are_refused(grid, message):
    with pytest.raises(UsageError, match=message):
        expand([grid], {})


@pytest.mark.parametrize("content", ["lr = ", "grid = 3", "grid = [1]", b"\xff"])
def test_files_that_are_no_grid_are_refused(tmp_path, content):
    path = tmp_path / "grid.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=r"grid\.toml"):
        read_grid(path)


def test_a_sweep_is_not_overwritten_and_not_mixed_with_another(caches, tmp_path):
    runs = small(heads=("linear",))
    with pytest.raises(UsageError, match="no sweep there"):
        sweep(*caches, runs=runs, out=tmp_path / "sweep", resume=True)
    sweep(*caches, runs=runs, out=tmp_path / "sweep")
    with pytest.raises(UsageError, match="holds a sweep already; use --resume"):
        sweep(*caches, runs=runs, out=tmp_path / "sweep")
    with pytest.raises(UsageError, match=r"--resume with other runs \(linear"):
        sweep(*caches, runs=small(heads=("linear",), lr=1.0), out=tmp_path / "sweep", resume=True)


def test_what_cannot_be_is_refused_before_anything_is_trained(caches, tmp_path):
    with pytest.raises(UsageError, match="decoder9 reads 9 layers"):
        sweep(*caches, runs=small(heads=("linear", "decoder9")), out=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_what_heads_read_together():
    decoder = Reads(layers=(3, 4), with_maps=True, tokens="all")
    probe = Reads(layers=(2,), with_maps=False, tokens="class")
    assert all_reads([decoder]) == decoder and all_reads([probe, probe]) == probe
    assert all_reads([decoder, probe]) == Reads(layers=(2, 3, 4), with_maps=True, tokens="both")


# The command


def call(*words):
    return CliRunner().invoke(cli, ["sweep", *map(str, words)], standalone_mode=False)


def test_the_command_trains_every_combination_and_prints_the_table(caches, tmp_path):
    given = ["--cache", caches[0].path, "--val-cache", caches[1].path, "--device", "cpu", "--epochs", "1"]
    axes = ["--head", "decoder1,linear", "--temporal", "all,none", "--seed", "0,1", "--batch", "4"]
    done = call(*given, *axes, "--out", tmp_path / "sweep")
    assert done.exception is None and done.return_value == 0, done.output
    rows = [line.split() for line in done.stdout.splitlines()[1:4]]
    assert {" ".join(row[: row.index("±") - 1]) for row in rows} == {
        "decoder1",
        "decoder1 temporal=none",
        "linear",
    }
    assert [float(row[row.index("±") - 1]) for row in rows] == sorted(
        (float(row[row.index("±") - 1]) for row in rows), reverse=True
    )
    assert (tmp_path / "sweep" / "report" / "report.html").exists()
    again = call(*given, *axes, "--out", tmp_path / "sweep", "--resume", "--json")
    found = json.loads(again.stdout)
    assert [row["status"] for row in found["runs"]] == ["done"] * 6 and found["passes"] == []
    refused = call(*given, *axes, "--out", tmp_path / "sweep")
    assert isinstance(refused.exception, UsageError) and "--resume" in str(refused.exception)


def test_the_command_takes_a_file_and_tells_of_heads_that_diverged(caches, tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(
        'epochs = 2\nbatch = 4\n[[grid]]\nhead = "decoder1"\nlr = [1e-3, 1e12]\ntemporal = "none"\n'
    )
    done = call(
        path, "--cache", caches[0].path, "--val-clips", write_names(tmp_path, ["c0", "c1"]), "--device", "cpu",
        "--out", tmp_path / "sweep",
    )  # fmt: skip
    assert done.return_value == 3 and "training diverged" in done.stderr
    assert read_sweep(tmp_path / "sweep").runs[0].status == "done"


def write_names(folder, names):
    path = folder / "names.txt"
    path.write_text("\n".join(names))
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "1e-3,fast"], "--lr '1e-3,fast'; expected float values, parted by commas"),
        (["--seed", "1.5"], "--seed '1.5'; expected int values"),
        (["--cache-in-ram", "much"], "--cache-in-ram 'much'; expected gigabytes"),
        (["--head", "cubic"], "unknown head"),
        (["--temporal", "some"], "temporal 'some'"),
    ],
)
def test_wrong_use_of_the_command_is_told(caches, words, message):
    done = call("--cache", caches[0].path, "--val-cache", caches[1].path, "--device", "cpu", *words)
    assert isinstance(done.exception, UsageError) and message in str(done.exception)
