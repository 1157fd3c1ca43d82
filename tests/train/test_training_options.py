"""What training offers beyond the loop: recipes, EMA, clipping, decay, auto batch, best epoch, stops, reports."""

import csv
import json
import os
import re
import signal
import sys
import types
from dataclasses import replace
from inspect import signature

import numpy as np
import pytest
import torch

from evl_cache import load_head
from evl_cache.batches import DEFAULT_BATCH, FeatureLoader
from evl_cache.batches.resident import KEPT_SHARE
from evl_cache.caches.pairing import find_training_caches
from evl_cache.errors import UsageError
from evl_cache.extract_options import CPU_DECODE_WORKERS
from evl_cache.heads import build_head
from evl_cache.live.predict import predict as live_predict
from evl_cache.precision import PRECISIONS, default_precision
from evl_cache.processes import MEMORY_SHARE, Interrupted
from evl_cache.processes.group import DEFAULT_TIMEOUT_S
from evl_cache.runs.directory import load_state, read_run_config
from evl_cache.runs.evaluate import evaluate
from evl_cache.runs.scoring import Scores
from evl_cache.runs.tables import worst_classes
from evl_cache.store import FeatureCache
from evl_cache.train.batch_size import largest_that
from evl_cache.train.loaders import BLOCKS_AT_A_TIME
from evl_cache.train.needs import needs_of
from evl_cache.train.optimisation import Optimisation, parameter_groups
from evl_cache.train.options import DEFAULT_EPOCHS, options_of
from evl_cache.train.stage import TrainOptions, train
from tests.support.feature_caches import write_cache, write_pair

OPTIONS = TrainOptions(head="decoder2", epochs=3, batch=4, lr=3e-3, seed=5)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("caches"))


def run(caches, out, *, options=OPTIONS, on_step=None, **more):
    losses = {}

    def note(done, total, loss):
        losses[done] = loss
        if on_step is not None:
            on_step(done)

    result = train(*caches, options=options, out=out, on_step=note, **more)
    return result, losses


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(path):
    return [{k: v for k, v in row.items() if k not in ("clips_per_s", "bottleneck")} for row in lines(path)]


def small_head(**changes):
    config = {"width": 8, "num_frames": 3, "grid": (2, 2), "num_classes": 3, "num_heads": 2, **changes}
    torch.manual_seed(0)
    return build_head("decoder2", **config)


def test_the_command_line_shows_the_defaults_of_the_package():
    from evl_cache_cli import evaluate, predict, sweep, train

    shown = {
        module: {option.name: option for option in module.command.params}
        for module in (evaluate, predict, sweep, train)
    }
    assert shown[evaluate]["batch"].default == DEFAULT_BATCH == TrainOptions.batch
    assert shown[predict]["batch"].default == signature(live_predict).parameters["batch"].default
    assert f"[CPU {CPU_DECODE_WORKERS}; GPU: all cores]" in shown[predict]["decode_workers"].help
    assert signature(live_predict).parameters["workers"].default is None
    assert shown[train]["rank_timeout"].default == DEFAULT_TIMEOUT_S
    for module in (train, sweep):
        numbers = {
            name: float(match[1])
            for name, option in shown[module].items()
            if name in TrainOptions.__annotations__ and (match := re.search(r"\[([\d.e-]+)[],]", option.help))
        }
        assert {"batch", "lr", "weight_decay", "dropout", "warmup_steps", "epochs"} <= numbers.keys()
        assert numbers.pop("epochs") == DEFAULT_EPOCHS
        assert numbers == {name: getattr(TrainOptions, name) for name in numbers}
        assert f"[{TrainOptions.head}]" in shown[module]["head"].help
    assert f"[{MEMORY_SHARE} of what is free]" in shown[sweep]["memory"].help
    assert KEPT_SHARE == 0.5 and "[half of what is free]" in shown[train]["cache_in_ram"].help
    assert f"else {BLOCKS_AT_A_TIME}]" in shown[train]["shuffle_blocks"].help


def test_a_training_that_nobody_configures_has_its_devices_precision():
    assert TrainOptions(epochs=1).precision == default_precision(TrainOptions.device)


# Recipes


def test_recipes_are_the_published_settings_and_options_given_win():
    k400, ssv2 = options_of("k400", {}), options_of("ssv2", {"batch": 32, "lr": None})
    assert (k400.lr, k400.weight_decay, k400.warmup_steps, k400.dropout) == (4e-4, 0.05, 0, 0.5)
    assert (k400.batch, k400.steps, k400.epochs, k400.decay_norms_and_biases) == (256, 50_000, None, True)
    assert (ssv2.batch, ssv2.steps, ssv2.lr) == (32, 30_000, 4e-4)
    assert options_of("k400", {"epochs": 3}).steps is None
    assert options_of(None, {}).epochs == 30
    with pytest.raises(UsageError, match="recipe 'k700'; expected one of k400, ssv2"):
        options_of("k700", {})


# The optimiser


def test_norms_and_biases_are_spared_from_decay_only_where_asked():
    head = small_head()
    (group,) = parameter_groups(head, 0.1, decay_norms_and_biases=True)
    assert group["weight_decay"] == 0.1 and len(group["params"]) == len(list(head.parameters()))
    decayed, spared = parameter_groups(head, 0.1, decay_norms_and_biases=False)
    names = {id(parameter): name for name, parameter in head.named_parameters()}
    found = {names[id(parameter)] for parameter in spared["params"]}
    expected = {name for name in names.values() if "norm" in name or name.endswith("bias")}
    assert found == expected and spared["weight_decay"] == 0.0
    assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - expected


def set_gradients(head, size):
    for parameter in head.parameters():
        parameter.grad = torch.full_like(parameter, size)


def test_gradients_are_clipped_to_their_common_norm():
    head = small_head()
    options = replace(OPTIONS, grad_clip=2.0)
    optimisation = Optimisation(head, options, total_steps=3)
    optimisation.begin(0)
    set_gradients(head, 1.0)
    optimisation.finish(0)
    norm = torch.sqrt(sum((p.grad**2).sum() for p in head.parameters()))
    assert float(norm) == pytest.approx(2.0, rel=1e-4)


def test_the_average_follows_the_weights_with_its_decay():
    head = small_head()
    optimisation = Optimisation(head, replace(OPTIONS, ema=0.6), total_steps=10)
    assert optimisation.result is optimisation.averaged
    expected = head.classifier.weight.detach().clone()
    for step in range(8):
        optimisation.begin(step)
        set_gradients(head, 0.5)
        optimisation.finish(step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * head.classifier.weight.detach()
    torch.testing.assert_close(optimisation.averaged.classifier.weight, expected)
    assert not torch.allclose(expected, head.classifier.weight)


def test_averaged_weights_are_validated_and_saved_and_both_are_kept(caches, tmp_path):
    result, _ = run(caches, tmp_path / "run", options=replace(OPTIONS, ema=0.9))
    state = load_state(tmp_path / "run")
    saved = load_head(tmp_path / "run").state_dict()
    assert all(torch.equal(saved[name], state["ema"][name]) for name in saved)
    assert not torch.equal(saved["classifier.weight"], state["head"]["classifier.weight"])
    assert evaluate(tmp_path / "run", caches[1]).loss == pytest.approx(
        lines(tmp_path / "run" / "metrics.jsonl")[-1]["val_loss"], abs=1e-6
    )
    assert result.steps == 12


def test_label_smoothing_is_the_cross_entropy_with_mixed_labels(caches, tmp_path):
    options = replace(OPTIONS, epochs=None, steps=1, batch=13, dropout=0.0)
    losses = {s: run(caches, tmp_path / str(s), options=replace(options, label_smoothing=s))[1][1] for s in (0, 0.3)}  # fmt: skip
    loader = FeatureLoader(caches[0], range(13), layers=(3, 4), batch=13, shuffle_seed=5)
    (batch,) = loader.epoch(0)
    torch.manual_seed(5)
    head = read_run_config(tmp_path / "0").build().eval()
    logs = torch.log_softmax(head(*batch.features.dequantized()), dim=-1)
    plain = -logs[torch.arange(13), batch.labels].mean().item()
    assert losses[0] == pytest.approx(plain, abs=1e-5)
    assert losses[0.3] == pytest.approx(0.7 * plain - 0.3 * logs.mean().item(), abs=1e-5)


@pytest.mark.parametrize("name", PRECISIONS)
def test_only_float16_scales_the_loss(name):
    optimisation = Optimisation(small_head(), replace(OPTIONS, precision=name), total_steps=3)
    assert optimisation.scaler.is_enabled() == (name == "float16")


def test_steps_that_float16_skips_are_no_divergence_and_a_continuation_skips_none_twice(
    caches, tmp_path, monkeypatch
):
    """The loss is scaled up at first until gradients overflow: such a step changes nothing but the scale."""
    real, finish, moved = torch.amp.GradScaler, Optimisation.finish, []

    def finish_and_note(self, step):
        before = self.head.classifier.weight.detach().clone()
        finish(self, step)
        moved.append(not torch.equal(before, self.head.classifier.weight))

    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda *args, **more: real(*args, **more | {"init_scale": 2.0**20})
    )
    monkeypatch.setattr(Optimisation, "finish", finish_and_note)
    options = replace(OPTIONS, precision="float16", save_every_steps=1)
    _, whole = run(caches, tmp_path / "whole", options=options)
    assert len(whole) == len(moved) == 12
    assert moved[:2] == [False, False] and any(moved)

    def stop(done):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(caches, tmp_path / "cut", options=options, on_step=stop)
    _, rest = run(caches, tmp_path / "cut", options=options, resume=True)
    assert rest == {step: whole[step] for step in rest} and max(rest) == 12


def test_a_run_is_not_continued_in_another_precision(caches, tmp_path):
    run(caches, tmp_path / "run")
    with pytest.raises(UsageError, match="--resume with other precision"):
        run(caches, tmp_path / "run", options=replace(OPTIONS, precision="bfloat16"), resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing is 1"),
        ({"ema": 1.0}, "ema is 1"),
        ({"grad_clip": 0.0}, "grad_clip is 0"),
        ({"save_every_steps": 0}, "save_every_steps is 0"),
        ({"batch": "large"}, "batch 'large'; expected a number, or auto"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        replace(OPTIONS, **options)


# The largest batch


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 64, 100, 1000, 5000])
def test_the_largest_batch_is_found_within_a_sixteenth_in_few_tries(limit):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= limit

    found = largest_that(fits, cap=1000)
    true = min(limit, 1000)
    assert found <= true and true - found <= max(0, true // 16)
    assert len(tried) <= 20 and max(tried) <= 1000


def test_an_automatic_batch_is_recorded_and_a_resumed_run_keeps_it(caches, tmp_path, monkeypatch):
    import evl_cache.train.batch_size as module

    options = replace(OPTIONS, batch="auto", epochs=2)
    first, losses = run(caches, tmp_path / "run", options=options)
    assert read_run_config(tmp_path / "run").training["batch"] == first.batch == 13  # all samples, at most
    assert len(losses) == 2
    monkeypatch.setattr(module, "largest_within", lambda *args, **more: 5)
    again, losses = run(caches, tmp_path / "run", options=options, resume=True)
    assert again.batch == 13 and losses == {}
    other, _ = run(caches, tmp_path / "other", options=replace(options, accumulate=2))
    assert other.batch == 10


# Stopping and going on


class Killed(Exception):
    pass


@pytest.mark.parametrize("how", [{"accumulate": 2}, {"ema": 0.9, "grad_clip": 1.0, "label_smoothing": 0.1}])
def test_killed_at_any_step_the_resumed_losses_equal_an_uninterrupted_runs(caches, tmp_path, how):
    options = replace(OPTIONS, **how)
    _, whole = run(caches, tmp_path / "whole", options=options)
    rng = np.random.default_rng(1)
    for number, (at, every) in enumerate(zip(rng.integers(6, 12, 4), (1, 2, 3, 5), strict=True)):
        out = tmp_path / f"cut{number}"
        sometimes = replace(options, save_every_steps=every)

        def die(done, at=at):
            if done == at:
                raise Killed

        with pytest.raises(Killed):
            run(caches, out, options=sometimes, on_step=die)
        kept = max((at - 1) // every * every, (at - 1) // 4 * 4)  # the last save, or the last epoch's end
        torch.manual_seed(int(at))
        _, rest = run(caches, out, options=replace(options, save_every_steps=1), resume=True)
        assert rest == {step: loss for step, loss in whole.items() if step > kept}
        assert [row["loss"] for row in lines(out / "steps.jsonl")] == list(whole.values())
        a, b = (load_head(path).state_dict() for path in (out, tmp_path / "whole"))
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert timeless(out / "metrics.jsonl") == timeless(tmp_path / "whole" / "metrics.jsonl")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_finish_and_keeps_the_state(caches, tmp_path, number):
    _, whole = run(caches, tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="--resume") as stopped:
        run(caches, tmp_path / "cut", on_step=lambda done: done == 6 and os.kill(os.getpid(), number))
    assert stopped.value.signal_number == number and signal.getsignal(number) is before
    kept = load_state(tmp_path / "cut")["progress"]["step"]
    assert kept in (6, 7) and f"step {kept} of 12" in str(stopped.value)
    _, rest = run(caches, tmp_path / "cut", resume=True)
    assert min(rest) == kept + 1 and all(whole[step] == loss for step, loss in rest.items())


def test_a_signal_during_validation_loses_no_step(caches, tmp_path, monkeypatch):
    import evl_cache.runs.scoring as module

    real, calls = module.head_logits, []

    def stop_in_second_validation(head, features, dtype):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(head, features, dtype)

    whole, _ = run(caches, tmp_path / "whole")
    monkeypatch.setattr(module, "head_logits", stop_in_second_validation)
    with pytest.raises(Interrupted):
        run(caches, tmp_path / "cut")
    monkeypatch.undo()
    torch.set_num_threads(1)
    result, rest = run(caches, tmp_path / "cut", resume=True)
    assert load_state(tmp_path / "cut")["progress"]["epoch"] == 3
    assert len(lines(tmp_path / "cut" / "metrics.jsonl")) == 3 and min(rest) in (5, 9)
    assert (result.top1, result.best_epoch) == (whole.top1, whole.best_epoch)


def test_where_a_run_is_trained_may_change_on_resuming_but_not_what_it_is(caches, tmp_path):
    run(caches, tmp_path / "run", options=replace(OPTIONS, save_every_steps=2))
    run(caches, tmp_path / "run", options=replace(OPTIONS, keep_in="ram"), resume=True)
    with pytest.raises(UsageError, match="--resume with other ema"):
        run(caches, tmp_path / "run", options=replace(OPTIONS, ema=0.9), resume=True)


# Reports


def test_the_best_epoch_is_kept_beside_the_last(caches, tmp_path):
    result, _ = run(caches, tmp_path / "run", options=replace(OPTIONS, epochs=6, lr=2e-2))
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    tops = [row["top1"] for row in rows]
    assert result.best_top1 == max(tops) and result.best_epoch == 1 + tops.index(max(tops))
    best = evaluate(tmp_path / "run", caches[1], best=True)
    assert best.top1 == max(tops)
    assert best.loss == pytest.approx(rows[result.best_epoch - 1]["val_loss"], abs=1e-6)
    assert evaluate(tmp_path / "run", caches[1]).top1 == tops[-1]


def test_every_epoch_names_what_it_waited_for(caches, tmp_path):
    named = []
    run(caches, tmp_path / "run", on_bottleneck=named.append)
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(named) == 12 and {row["bottleneck"] for row in rows} <= {"device", "disk", "processor"}


def test_the_confusion_matrix_counts_every_clip_and_names_mistakes(caches, tmp_path):
    result, _ = run(caches, tmp_path / "run")
    with (tmp_path / "run" / "confusion.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["class", "class0", "class1", "class2"] and [row[0] for row in rows] == header[1:]
    counts = np.asarray([[int(x) for x in row[1:]] for row in rows])
    assert counts.sum(1).tolist() == [1, 2, 2]
    assert 100 * np.trace(counts) / counts.sum() == pytest.approx(result.top1)
    worst = worst_classes(tmp_path / "run", 2)
    assert len(worst) == 2 and worst[0].top1 <= worst[1].top1


def test_a_table_by_class_by_hand():
    said = np.asarray([[0.9, 0.1, 0], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.5, 0.5, 0]])
    scores = Scores(clips=np.arange(4), labels=np.asarray([0, 0, 1, 1]), probabilities=said, loss=0.0)
    assert scores.confusion().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    first, second = scores.by_class(("a", "b", "c"))
    assert (first.name, first.clips, first.top1, first.mistaken_for) == ("a", 2, 50.0, "b")
    assert (second.name, second.mistaken_for) == ("b", "a")


def test_tensorboard_that_is_missing_is_named_with_the_remedy(caches, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'evl-cache\[tensorboard\]'"):
        run(caches, tmp_path / "run", options=replace(OPTIONS, tensorboard=True))


def test_tensorboard_gets_every_step_and_epoch(caches, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert folder.endswith("tensorboard") and purge_step == 1

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            written.append(("closed", 0))

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run(caches, tmp_path / "run", options=replace(OPTIONS, epochs=1, tensorboard=True))
    assert [step for name, step in written if name == "train/loss"] == [1, 2, 3, 4]
    assert ("epoch/top1", 4) in written and written[-1] == ("closed", 0)


def test_clips_without_features_are_counted(tmp_path):
    path = write_cache(tmp_path / "cache", failed=(1, 4, 6)).path
    cache = FeatureCache(path)
    result, _ = run((cache, cache), tmp_path / "run", train_clips=[0, 1, 2, 3], val_clips=[4, 5, 6, 7])
    assert result.skipped_clips == 3 and result.val_clips == 2


def test_far_from_the_disk_blocks_are_shuffled_and_a_resumed_run_keeps_it(caches, tmp_path, monkeypatch):
    opened = [FeatureCache(cache.path) for cache in caches]
    options = replace(OPTIONS, epochs=None, steps=4)
    _, near = run(opened, tmp_path / "near", options=options)
    assert read_run_config(tmp_path / "near").training["shuffle_blocks"] == 0
    monkeypatch.setattr(opened[0], "is_local", False)
    _, far = run(opened, tmp_path / "far", options=options)
    assert read_run_config(tmp_path / "far").training["shuffle_blocks"] == 16
    run(opened, tmp_path / "one", options=replace(options, shuffle_blocks=1))
    monkeypatch.setattr(opened[0], "is_local", True)  # the cache was copied to a local disk: the order stays
    whole = run(opened, tmp_path / "far", options=options, resume=True)[0]
    assert whole.epochs >= 1 and read_run_config(tmp_path / "far").training["shuffle_blocks"] == 16
    with pytest.raises(UsageError, match="other shuffle_blocks"):
        run(opened, tmp_path / "far", options=replace(options, shuffle_blocks=1), resume=True)
    assert near.keys() == far.keys()


def test_within_one_block_at_a_time_an_epoch_reads_block_after_block(caches):
    cache = FeatureCache(caches[0].path)
    loader = FeatureLoader(
        cache, np.arange(len(cache)), layers=cache.spec.layers, batch=4, shuffle_seed=3, shuffle_blocks=1
    )
    blocks = loader.order.of(0) // cache.spec.block_samples
    assert len(set(blocks)) > 1 and np.count_nonzero(np.diff(blocks)) == len(set(blocks)) - 1


def test_trusted_caches_are_opened_without_their_checks(caches):
    train_path, val_path = (cache.path for cache in caches)
    for trust in (False, True):
        opened = find_training_caches(
            None,
            train_path,
            val_path,
            needs=needs_of([OPTIONS]),
            same_cache_for_val=False,
            trust=trust,
        )
        assert [cache._samples._trust for cache in opened] == [trust, trust]
