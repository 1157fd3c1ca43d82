"""Stage two on small caches of random features: determinism, resumption, folds, and every refusal."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from evl_cache import load_head
from evl_cache.batches import FeatureLoader, samples_of_clips
from evl_cache.batches.folds import split_clips
from evl_cache.caches.pairing import find_training_caches
from evl_cache.errors import EvlCacheError, UsageError, WeightsError
from evl_cache.runs.directory import load_state
from evl_cache.runs.evaluate import evaluate
from evl_cache.runs.intervals import wilson_interval
from evl_cache.runs.scoring import score
from evl_cache.spec import ViewSpec
from evl_cache.train.needs import needs_of
from evl_cache.train.stage import TrainOptions, train
from tests.support.feature_caches import TOWER, VIEWS, write_cache, write_pair

OPTIONS = TrainOptions(head="decoder2", epochs=3, batch=4, lr=3e-3, seed=5)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="module")
def two_views(tmp_path_factory):
    path = tmp_path_factory.mktemp("views") / "cache"
    return write_cache(path, views=replace(VIEWS, temporal_views=3), failed=(2, 6))


def run(caches, out, *, options=OPTIONS, **more):
    """Train; returns the result and the loss of every step."""
    losses = []
    result = train(
        *caches, options=options, out=out, on_step=lambda done, total, loss: losses.append(loss), **more
    )
    return result, losses


def weights(out):
    return load_head(out).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_is_determined_by_its_seed(caches, tmp_path):
    _, first = run(caches, tmp_path / "a")
    torch.manual_seed(123)
    _, second = run(caches, tmp_path / "b")
    _, other = run(caches, tmp_path / "c", options=replace(OPTIONS, seed=6))
    assert first == second and same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert first != other and not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_training_learns_what_the_features_say(caches, tmp_path):
    result, losses = run(caches, tmp_path / "a", options=replace(OPTIONS, epochs=12, lr=1e-2, dropout=0.1))
    assert np.mean(losses[-4:]) < 0.5 * losses[0]
    assert result.top1 >= 80


class Killed(Exception):
    pass


@pytest.mark.parametrize("length", [{"epochs": 4}, {"epochs": None, "steps": 14}])
@pytest.mark.parametrize(
    "killed_at", [5, 8, 9]
)  # of 4 steps an epoch: after its first, at its last, after it
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(caches, tmp_path, killed_at, length):
    options = replace(OPTIONS, accumulate=2, **length)
    whole_result, whole = run(caches, tmp_path / "whole", options=options)
    losses = {}

    def on_step(done, total, loss):
        losses[done] = loss
        if done == killed_at and len(losses) == killed_at:
            raise Killed

    with pytest.raises(Killed):
        train(*caches, options=options, out=tmp_path / "cut", on_step=on_step)
    torch.manual_seed(77)
    seen = dict(losses)
    losses.clear()
    result = train(*caches, options=options, out=tmp_path / "cut", on_step=on_step, resume=True)
    assert min(losses) == 4 * ((killed_at - 1) // 4) + 1
    assert [{**seen, **losses}[step] for step in range(1, len(whole) + 1)] == whole
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert (result.top1, result.steps, result.epochs) == (
        whole_result.top1,
        whole_result.steps,
        whole_result.epochs,
    )
    rows = [
        [json.loads(line) for line in (tmp_path / r / "metrics.jsonl").read_text().splitlines()]
        for r in ("whole", "cut")
    ]
    timeless = [
        [{k: v for k, v in row.items() if k not in ("clips_per_s", "bottleneck")} for row in lines]
        for lines in rows
    ]
    assert timeless[0] == timeless[1]


def test_accumulated_batches_equal_one_large_batch(caches, tmp_path):
    # 13 clips in batches of 8: the last batch, and its last part, are smaller
    options = replace(OPTIONS, batch=8, dropout=0.0)
    _, whole = run(caches, tmp_path / "whole", options=options)
    _, parts = run(caches, tmp_path / "parts", options=replace(options, accumulate=4))
    assert len(whole) == len(parts) == 6
    assert parts == pytest.approx(whole, abs=2e-5)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in a:
        if not name.endswith("k_proj.bias"):  # its gradient is rounding: exactly zero in theory
            torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=0, msg=name)


def test_the_learning_rate_warms_up_and_falls_to_nearly_zero():
    from evl_cache.train.optimisation import lr_factor

    factors = [lr_factor(step, warmup=3, total=10) for step in range(11)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[3:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 7)) for i in range(8)])
    assert factors[10] == pytest.approx(0)


def test_scores_average_the_softmax_over_a_clips_views(two_views, tmp_path):
    result, _ = run((two_views, two_views), tmp_path / "run")
    head = load_head(tmp_path / "run")
    right = {1: 0, 2: 0}
    served = [row for row in range(13) if row not in (2, 6)]
    loader = FeatureLoader(two_views, samples_of_clips(two_views, None), layers=(3, 4), batch=4)
    scores = score(head, loader, device=torch.device("cpu"))
    assert scores.clips.tolist() == served
    for i, row in enumerate(served):
        probabilities = torch.zeros(3, dtype=torch.float64)
        for sample in range(3 * row, 3 * row + 3):
            tokens, maps = two_views.read([sample], layers=(3, 4))
            with torch.no_grad():
                probabilities += torch.softmax(head(tokens, maps)[0].double(), dim=0) / 3
        np.testing.assert_allclose(scores.probabilities[i], probabilities.numpy(), atol=1e-6)
        order = probabilities.argsort(descending=True).tolist()
        for k in right:
            right[k] += two_views.clips[row].label in order[:k]
    assert result.val_clips == len(served) == 11
    assert result.top1 == pytest.approx(100 * right[1] / 11)
    assert result.top5 == 100.0  # of three classes
    scored = evaluate(tmp_path / "run", two_views)
    assert (scored.top1, scored.top5, scored.val_clips) == (result.top1, result.top5, 11)


def test_failed_clips_are_never_served(two_views):
    loader = FeatureLoader(two_views, samples_of_clips(two_views, None), layers=(4,), batch=4, shuffle_seed=1)
    for epoch in range(3):
        rows = np.concatenate([batch.samples for batch in loader.epoch(epoch)])
        clips = two_views.sample_clips[rows]
        assert len(rows) == 33 and len(set(rows.tolist())) == 33
        assert set(clips.tolist()) == set(range(13)) - {2, 6}


def test_labels_go_with_their_features(two_views):
    loader = FeatureLoader(two_views, samples_of_clips(two_views, None), layers=(4,), batch=4, shuffle_seed=1)
    for batch in loader.epoch(0):
        expected, _ = two_views.read(batch.samples.tolist(), layers=(4,))
        found, _ = batch.features.dequantized()
        assert torch.equal(found[0], expected[0])
        assert batch.labels.tolist() == [
            two_views.clips[two_views.sample_clips[row]].label for row in batch.samples
        ]


def test_an_epochs_order_is_drawn_anew_from_the_seed(two_views):
    def orders(seed):
        loader = FeatureLoader(two_views, range(39), layers=(4,), batch=8, with_maps=False, shuffle_seed=seed)
        return [np.concatenate([b.samples for b in loader.epoch(n)]).tolist() for n in (0, 1, 0)]

    first, second, again = orders(1)
    assert first == again and first != second and sorted(first) == sorted(second)
    assert orders(2)[0] != first


def test_only_failed_clips_to_train_on_is_an_error(two_views):
    with pytest.raises(UsageError, match="none of the 6 samples"):
        FeatureLoader(two_views, samples_of_clips(two_views, [2, 6]), layers=(4,), batch=4)


def test_the_run_directory_holds_what_the_contract_says(caches, tmp_path):
    out = tmp_path / "runs" / "one"
    result, _ = run(caches, out)
    files = "config.json head.safetensors best.safetensors last.pt metrics.jsonl steps.jsonl result.json"
    files = {*files.split(), "confusion.csv", "classes.json", "scored.csv"}
    assert {path.name for path in out.iterdir()} == files
    found = json.loads((out / "result.json").read_text())
    assert found["val_clips"] == 5 and found["clips_per_s"] > 0
    assert found["cache_fingerprint"] == caches[0].fingerprint
    assert 0 <= found["top1"] <= found["top5"] <= 100 and found["top1"] == result.top1
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["top1"] == result.top1
    assert all(math.isfinite(line["train_loss"]) and line["lr"] > 0 for line in lines)


def test_a_loaded_head_gives_the_same_logits(caches, tmp_path):
    run(caches, tmp_path / "run")
    state = load_state(tmp_path / "run")
    head = load_head(str(tmp_path / "run"))
    assert not head.training and same(head.state_dict(), state["head"])
    tokens, maps = caches[1].read(range(5), layers=(3, 4))
    again = load_head(tmp_path / "run")
    assert torch.equal(head(tokens, maps), again(tokens, maps))


def test_eval_equals_the_result_of_train(caches, tmp_path):
    result, _ = run(caches, tmp_path / "run")
    for batch in (2, 64):
        scored = evaluate(tmp_path / "run", caches[1], batch=batch)
        assert (scored.top1, scored.top5, scored.val_clips) == (result.top1, result.top5, result.val_clips)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert scored.loss == pytest.approx(last["val_loss"], abs=1e-6)


def test_eval_says_how_sure_it_is_and_whose_clips_it_scored(caches, tmp_path):
    cache = caches[0]
    options = replace(OPTIONS, epochs=1)
    for seed in (0, 1):
        sides = {"train_clips": range(6), "val_clips": [6, 7, 8]}
        run((cache, cache), tmp_path / f"{seed}", options=replace(options, seed=seed), **sides)
    own = evaluate(tmp_path / "0", cache, clips=[8, 7, 6])
    assert (own.scored_on, own.clips_trained_on) == ("validation", 0)
    assert own.top1_interval == wilson_interval(own.top1, 3) and own.top5_interval[1] == 100.0
    seen = evaluate(tmp_path / "0", cache, clips=range(6))
    assert (seen.scored_on, seen.clips_trained_on) == ("training", 6)
    some = evaluate(tmp_path / "0", cache, clips=[5, 6, 9])
    assert (some.scored_on, some.clips_trained_on) == ("other", 1)
    other = evaluate(tmp_path / "0", caches[1])
    assert (other.scored_on, other.clips_trained_on) == ("other", 0)  # of another list, by their ids
    seed = evaluate(tmp_path / "1", cache, clips=[6, 7, 8])
    assert own.comparable_key == seed.comparable_key
    assert len({found.comparable_key for found in (own, seen, some, other)}) == 4
    assert own.comparable_key != evaluate(tmp_path / "0", cache, clips=[6, 7, 8], best=True).comparable_key


def test_a_head_without_modules_needs_no_maps(tmp_path):
    cache = write_cache(tmp_path / "cache", maps="none")
    with pytest.raises(UsageError, match=r"holds no attention maps.*--no-temporal-cross-attention"):
        run((cache, cache), tmp_path / "run")
    result, _ = run(
        (cache, cache), tmp_path / "run", options=replace(OPTIONS, temporal_cross_attention=False)
    )
    assert evaluate(tmp_path / "run", cache).top1 == result.top1


def test_a_validation_cache_without_maps_is_refused_before_anything_is_trained(caches, tmp_path):
    val = write_cache(tmp_path / "val", labels=(0, 1), prefix="o", maps="none")
    with pytest.raises(UsageError, match=r"val holds no attention maps.*extract with --maps"):
        run((caches[0], val), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_single_frame_needs_no_maps(tmp_path):
    cache = write_cache(tmp_path / "cache", views=replace(VIEWS, frames=1))
    result, _ = run((cache, cache), tmp_path / "run")
    assert result.val_clips == 13


# Folds


def names(cache, rows):
    return [cache.clips[row].id for row in rows]


def test_clips_held_out_are_not_trained_on(caches):
    cache, _ = caches
    assert split_clips(cache, cache, train_names=None, val_names=["c3", "dir/c7.mp4"]) == (
        [row for row in range(13) if row not in (3, 7)],
        [3, 7],
    )


def test_clips_trained_on_are_not_validated_on(caches):
    cache, _ = caches
    train_rows, val_rows = split_clips(cache, cache, train_names=names(cache, range(9)), val_names=None)
    assert train_rows == list(range(9)) and val_rows == [9, 10, 11, 12]


def test_a_clip_on_both_sides_is_refused(caches):
    cache, _ = caches
    with pytest.raises(UsageError, match=r"'c3' and 0 more are in --train-clips and in --val-clips"):
        split_clips(cache, cache, train_names=["c1", "c3"], val_names=["c3"])


def test_folds_hold_also_between_two_caches_of_the_same_clips(caches, two_views):
    # other views, failed clips and paths, but the same list: the same rows are the same clips
    train_rows, val_rows = split_clips(caches[0], two_views, train_names=None, val_names=["c0", "c12"])
    assert val_rows == [0, 12] and train_rows == list(range(1, 12))
    with pytest.raises(UsageError, match="keep them apart"):
        split_clips(caches[0], two_views, train_names=["c0"], val_names=["c0", "c12"])


def test_caches_of_other_clips_are_taken_whole(caches):
    assert split_clips(*caches, train_names=None, val_names=None) == (None, None)
    assert split_clips(*caches, train_names=None, val_names=["v1"]) == (None, [1])


def test_a_fold_trains_and_validates_on_its_own_clips_only(caches, tmp_path):
    cache, _ = caches
    options = replace(OPTIONS, epochs=1, batch=1)
    result, losses = run(
        (cache, cache), tmp_path / "run", options=options, train_clips=[0, 1, 2], val_clips=[3, 4]
    )
    assert len(losses) == 3 and result.val_clips == 2
    assert evaluate(tmp_path / "run", cache, clips=[3, 4]).top1 == result.top1


def test_a_run_is_not_resumed_on_another_fold(caches, tmp_path):
    cache, _ = caches
    run((cache, cache), tmp_path / "run", train_clips=[0, 1, 2], val_clips=[3, 4])
    with pytest.raises(UsageError, match="--resume with other train clips, val clips"):
        run((cache, cache), tmp_path / "run", train_clips=[3, 4], val_clips=[0, 1, 2], resume=True)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": None}, "exactly one"),
        ({"steps": 5}, "exactly one"),
        ({"batch": 0}, "batch is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"batch": 6, "accumulate": 4}, "not divisible by accumulate 4"),
        ({"lr": 0.0}, "lr above 0"),
        ({"weight_decay": -1.0}, "weight_decay -1"),
        ({"warmup_steps": -1}, "warmup_steps -1"),
        ({"precision": "int8"}, "float32, tf32, bfloat16, float16"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        replace(OPTIONS, **options)


def test_a_dropout_of_one_is_refused_before_anything_is_written(caches, tmp_path):
    with pytest.raises(UsageError, match=r"dropout is 1\.0"):
        run(caches, tmp_path / "run", options=replace(OPTIONS, dropout=1.0))


def test_a_deeper_head_than_layers_names_both(caches, tmp_path):
    with pytest.raises(
        UsageError, match=r"decoder6 reads 6 layers, the cache has 3 \[2, 3, 4\]; use decoder3"
    ):
        run(caches, tmp_path / "run", options=replace(OPTIONS, head="decoder6"))
    with pytest.raises(UsageError, match="unknown head 'quadratic'"):
        run(caches, tmp_path / "run", options=replace(OPTIONS, head="quadratic"))
    with pytest.raises(UsageError, match=r"\[9\] are not cached"):
        run(caches, tmp_path / "run", options=replace(OPTIONS, head_layers=(2, 9)))
    with pytest.raises(UsageError, match="decoder2 reads 2 layers, --head-layers names 3"):
        run(caches, tmp_path / "run", options=replace(OPTIONS, head_layers=(2, 3, 4)))
    assert not (tmp_path / "run").exists()


def test_divergence_is_one_line_and_keeps_the_last_state(caches, tmp_path):
    options = replace(OPTIONS, epochs=20, lr=1e9, warmup_steps=0)
    with pytest.raises(EvlCacheError, match=r"training diverged; use a lower --lr") as raised:
        run(caches, tmp_path / "run", options=options)
    assert "\n" not in str(raised.value)
    if (tmp_path / "run" / "last.pt").exists():
        state = load_state(tmp_path / "run")
        assert all(torch.isfinite(value).all() for value in state["head"].values())


def test_a_loss_that_is_no_number_keeps_the_state_of_the_epoch_before(caches, tmp_path, monkeypatch):
    import evl_cache.train.passes as module

    calls = []
    real = module.head_logits

    def break_in_second_epoch(head, features, dtype):
        calls.append(1)
        return real(head, features, dtype) * (math.nan if len(calls) == 6 else 1.0)

    monkeypatch.setattr(module, "head_logits", break_in_second_epoch)
    with pytest.raises(EvlCacheError, match="loss is nan at step 6: training diverged"):
        run(caches, tmp_path / "run")
    state = load_state(tmp_path / "run")
    assert (state["progress"]["epoch"], state["progress"]["step"]) == (1, 4)
    assert same(weights(tmp_path / "run"), state["head"])


def test_a_run_is_not_overwritten(caches, tmp_path):
    run(caches, tmp_path / "run")
    before = (tmp_path / "run" / "head.safetensors").read_bytes()
    with pytest.raises(UsageError, match="holds a run already; use --resume, or another --out"):
        run(caches, tmp_path / "run")
    (tmp_path / "run" / "last.pt").unlink()  # as import-head leaves it
    with pytest.raises(UsageError, match="holds a run already"):
        run(caches, tmp_path / "run")
    assert (tmp_path / "run" / "head.safetensors").read_bytes() == before


def test_resuming_with_other_options_names_them(caches, tmp_path):
    run(caches, tmp_path / "run")
    with pytest.raises(UsageError, match="--resume with other lr, dropout"):
        run(caches, tmp_path / "run", options=replace(OPTIONS, lr=1.0, dropout=0.1), resume=True)
    with pytest.raises(UsageError, match="no run there"):
        run(caches, tmp_path / "nothing", resume=True)


def test_resuming_a_finished_run_changes_nothing(caches, tmp_path):
    first, _ = run(caches, tmp_path / "run")
    before = weights(tmp_path / "run")
    again, losses = run(caches, tmp_path / "run", resume=True)
    assert losses == [] and again.top1 == first.top1 and same(before, weights(tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tower": replace(TOWER, weights_sha256="34" * 32)}, "weights 121212121212, not 343434343434"),
        ({"views": replace(VIEWS, stride=4)}, "stride 2, not 4"),
        ({"views": replace(VIEWS, frames=4)}, "frames 3, not 4"),
        ({"views": ViewSpec(frames=3, sampling="tsn", stride=None)}, "sampling strided, not tsn"),
        ({"tower": replace(TOWER, mean=(0.1, 0.2, 0.3))}, r"mean \(0.5, 0.5, 0.5\), not \(0.1, 0.2, 0.3\)"),
        ({"classes": 4}, "3 classes, not 4"),
    ],
)
def test_caches_that_do_not_belong_together_are_refused(caches, tmp_path, change, message):
    other = write_cache(tmp_path / "other", labels=(0, 1), prefix="o", **change)
    with pytest.raises(UsageError, match=f"do not belong together: .*{message}"):
        run((caches[0], other), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": replace(VIEWS, frames=4)}, "needs frames 3, not 4"),
        ({"tower": replace(TOWER, image_size=24)}, r"patches \(2, 2\), not \(3, 3\)"),
        ({"tower": replace(TOWER, width=32)}, "channels 16, not 32"),
        ({"tower": replace(TOWER, weights_sha256="34" * 32)}, "weights 121212121212, not 343434343434"),
        ({"layers": (1, 2)}, r"reads 2 layers \[3, 4\], the cache has \[1, 2\]"),
        ({"classes": 7}, "head has 3 classes.*has 7"),
        ({"maps": "none"}, "holds no attention maps"),
    ],
)
def test_a_cache_for_another_head_is_refused_naming_both_sides(caches, tmp_path, change, message):
    run(caches, tmp_path / "run", options=replace(OPTIONS, epochs=1))
    other = write_cache(tmp_path / "other", labels=(0, 1), **change)
    with pytest.raises(UsageError, match=message):
        evaluate(tmp_path / "run", other)


def test_classes_of_other_names_are_refused(caches, tmp_path):
    run(caches, tmp_path / "run", options=replace(OPTIONS, epochs=1))
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["classes"][1] = "other"
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"matched by name: there is no class 'class1' \(but 'other'\)"):
        evaluate(tmp_path / "run", caches[1])


def test_a_damaged_run_is_refused_in_one_line(caches, tmp_path):
    run(caches, tmp_path / "run", options=replace(OPTIONS, epochs=1))
    head = tmp_path / "run" / "head.safetensors"
    whole = head.read_bytes()
    for content in (b"", whole[:100], whole[:-10]):
        head.write_bytes(content)
        with pytest.raises(WeightsError, match="not a valid safetensors file"):
            load_head(tmp_path / "run")
    head.unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        load_head(tmp_path / "run")
    for content in ("", "[]", "{}", '{"format": 9}', '{"format": 1, "layers": null}'):
        (tmp_path / "run" / "config.json").write_text(content)
        with pytest.raises(UsageError, match=r"config\.json"):
            load_head(tmp_path / "run")
    (tmp_path / "run" / "last.pt").write_bytes(b"noise")
    with pytest.raises(UsageError, match=r"last\.pt: cannot be read"):
        load_state(tmp_path / "run")


# Finding caches


def find(dataset="test", cache=None, val_cache=None, *, head="decoder2", same_cache_for_val=False):
    return find_training_caches(
        dataset,
        cache,
        val_cache,
        needs=needs_of([replace(OPTIONS, head=head)]),
        same_cache_for_val=same_cache_for_val,
    )


def test_the_one_pair_that_fits_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("EVL_CACHE_ROOT", str(tmp_path))
    with pytest.raises(UsageError, match=f"no caches of test under {tmp_path}; run evl-cache extract"):
        find()
    write_cache(tmp_path / "a")
    with pytest.raises(UsageError, match=r"no pair .*fits the head; there are: a \(test train"):
        find()
    write_cache(tmp_path / "b", split="val", prefix="v")
    write_cache(tmp_path / "other", split="train", dataset="else")
    (tmp_path / "notes.txt").touch()
    for dataset in ("test", None):  # "else" has no validation cache
        assert [cache.path.name for cache in find(dataset)] == ["a", "b"]
    with pytest.raises(UsageError, match="no pair"):
        find(head="decoder4")
    write_cache(tmp_path / "c", split="val", prefix="v", labels=(0, 1))
    with pytest.raises(UsageError, match=r"several caches of test .*: a \(.*; b \(.*; c \("):
        find()


def test_caches_named_are_opened_and_half_a_naming_is_refused(caches):
    train_cache, val_cache = (cache.path for cache in caches)
    opened = find(None, train_cache, val_cache)
    assert [cache.path for cache in opened] == [train_cache, val_cache]
    one, other = find(None, train_cache, same_cache_for_val=True)
    assert one is other
    with pytest.raises(UsageError, match="without --val-cache"):
        find(None, train_cache)
    with pytest.raises(UsageError, match="expected one of them at most"):
        find("test", train_cache)
