"""Which runs are seeds of one training, and what tells all others apart."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from evl_cache.canonical_json import digest
from evl_cache.runs import comparable
from evl_cache.runs.comparable import (
    clips_of_run,
    comparable_key,
    comparable_rows,
    differences,
    distinct_names,
    samples_digest,
    scored_key,
)
from evl_cache.runs.directory import RunConfig
from evl_cache.train.options import TrainOptions
from tests.support.feature_caches import TOWER, cache_spec

CAST = {"train": range(13), "val": range(5)}


def run(*, spec=None, sides=None, **options):
    """What a run of decoder2 on small caches records."""
    spec = spec or cache_spec()
    chosen = TrainOptions(**{"head": "decoder2", "epochs": 1, "batch": 4, **options})
    caches = {
        side: {
            "path": f"caches/{side}",
            "fingerprint": f"{side}-digest",
            "samples": len(rows),
            "sample_nbytes": 10,
            "samples_sha256": samples_digest(np.asarray(rows)),
            **(sides or {}).get(side, {}),
        }
        for side, rows in CAST.items()
    }
    config = RunConfig(
        head=chosen.head,
        head_config={
            "num_layers": 2,
            "num_classes": 3,
            "dropout": chosen.dropout,
            "num_heads": chosen.num_heads,
        },
        layers=(3, 4),
        classes=spec.classes,
        features=spec.to_json(),
        training=asdict(chosen),
        caches=caches,
    )
    return RunConfig(**json.loads(json.dumps(asdict(config)), object_hook=dict))


def test_seeds_devices_and_where_samples_are_kept_make_no_other_row():
    same = [
        run(),
        run(seed=1),
        run(seed=2, order_seed=0),
        run(seed=3, device="cuda", keep_in="ram", read_threads=3, cuda_graph=False, save_every_steps=1),
        run(seed=4, head_layers=(3, 4)),  # named, where they are the last ones anyway
        run(seed=5, sides={"train": {"path": "elsewhere", "sample_nbytes": 11}}),
    ]
    assert comparable_rows(same) == [[0, 1, 2, 3, 4, 5]]
    assert len({comparable_key(config) for config in same}) == 1


OTHERS = {
    "weights": (
        run(spec=cache_spec(tower=replace(TOWER, weights_sha256="34" * 32))),
        "weights tiny 34343434",
    ),
    "storage": (run(spec=cache_spec(maps="fp16")), "maps fp16"),
    "classes": (run(spec=cache_spec(classes=4)), "classes 4 ("),
    "training cache": (run(sides={"train": {"fingerprint": "other-digest"}}), "train cache train (other-di)"),
    "validation cache": (run(sides={"val": {"fingerprint": "other-digest"}}), "val cache val (other-di)"),
    "fold": (
        run(sides={"val": {"samples_sha256": "ab" * 32, "samples": 6}}),
        "val clips 6 samples (abababab)",
    ),
    "clips trained": (
        run(sides={"train": {"samples_sha256": "ab" * 32}}),
        "train clips 13 samples (abababab)",
    ),
    "head": (run(head="linear"), "head linear"),
    "option": (run(lr=1e-3), "lr 0.001"),
    "dropout": (run(dropout=0.25), "dropout 0.25"),
    "length": (run(epochs=2), "epochs 2"),
    "precision": (run(precision="bfloat16"), "precision bfloat16"),
    "clipping": (run(grad_clip=1.0), "grad_clip 1"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_makes_another_training_is_a_row_of_its_own_and_is_named(what):
    other, told = OTHERS[what]
    assert comparable_rows([run(), other, run(seed=1)]) == [[0, 2], [1]]
    assert comparable_key(run()) != comparable_key(other)
    mine, theirs = differences([run(), other])
    assert told in theirs and told not in mine and mine


def test_what_differs_alone_is_named():
    assert differences([run(), run(lr=1e-3)]) == ["lr 0.0004", "lr 0.001"]
    assert differences([run(), run(grad_clip=1.0, lr=1e-3)])[0] == "lr 0.0004, grad_clip off"
    assert differences([run(), run(seed=1)]) == ["", ""] and differences([run()]) == [""]
    other = run(
        spec=cache_spec(tower=replace(TOWER, weights_sha256="34" * 32)),
        sides={"val": {"fingerprint": "other"}},
    )
    assert differences([run(), other]) == ["weights tiny 12121212", "weights tiny 34343434"]


def test_a_run_that_was_done_again_is_no_further_seed():
    assert comparable_rows([run(), run(seed=1), run(), run(seed=1, device="cuda")]) == [[0, 1], [2, 3]]


def test_early_runs_that_recorded_less_are_told_apart_by_what_they_have():
    early = {side: {"samples_sha256": None} for side in CAST}
    one, other = run(sides=early), run(seed=1, sides={**early, "val": {"samples_sha256": None, "samples": 6}})
    assert comparable_rows([one, run(seed=1, sides=early), other]) == [[0, 1], [2]]
    stranger = replace(run(), features={"weights": "mine"}, caches={})
    assert comparable_rows([stranger, run()]) == [[0], [1]] and differences([stranger, run()])[0]


def test_names_that_are_used_twice_are_told_apart():
    assert distinct_names(["a", "b"], ["lr 1", "lr 2"], otherwise=str) == ["a", "b"]
    assert distinct_names(["a", "a"], ["lr 1", "lr 2"], otherwise=str) == ["a (lr 1)", "a (lr 2)"]
    assert distinct_names(["a", "a"], ["", ""], otherwise="run {}".format) == ["a (run 0)", "a (run 1)"]


def test_whose_clips_were_scored_is_told_by_cache_and_rows():
    config = run()
    rows = {side: np.asarray(samples) for side, samples in CAST.items()}
    assert clips_of_run(config, fingerprint="val-digest", samples=rows["val"][::-1]) == "validation"
    assert clips_of_run(config, fingerprint="train-digest", samples=rows["train"]) == "training"
    assert clips_of_run(config, fingerprint="val-digest", samples=rows["val"][1:]) == "other"
    assert clips_of_run(config, fingerprint="another", samples=rows["val"]) == "other"
    same = scored_key(config, fingerprint="val-digest", samples=rows["val"])
    assert same == comparable_key(config)
    assert scored_key(config, fingerprint="val-digest", samples=rows["val"][1:]) != same


@pytest.mark.parametrize("count", [0, 1, 3, 4, 10])
def test_the_digest_of_samples_is_that_of_their_sorted_list(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparable, "_DIGESTED_AT_A_TIME", 3)
    rows = np.arange(count)[::-1] * 7
    assert samples_digest(rows) == digest(sorted(rows.tolist()))
