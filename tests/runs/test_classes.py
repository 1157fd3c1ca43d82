"""Scores by the names of classes: their order and number are a cache's own, and a head is right or wrong by name."""

import json
import re
import shutil
import unicodedata
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evl_cache.errors import UsageError
from evl_cache.runs import (
    load_head,
    match_classes,
    read_json_lines,
    read_run_config,
    save_head,
    write_run_config,
)
from evl_cache.runs.evaluate import EvalResult, evaluate
from evl_cache.runs.scoring import ViewSums
from evl_cache.store import FeatureCache
from evl_cache.sweep import sweep
from evl_cache.sweep.grid import expand
from evl_cache.train.stage import TrainOptions, train
from tests.support.feature_caches import write_cache

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = TrainOptions(head="linear", epochs=8, batch=4, lr=1e-2)
CLAP, JUMP, RUN, WALK = "clap", "jump", "run", "walk"
CAFE = "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
ORDER, OTHER = (CLAP, JUMP, RUN), (RUN, CLAP, JUMP)
VAL = (CLAP, JUMP, RUN, RUN, JUMP)
RUN_FILES = ("head.safetensors", "best.safetensors", "confusion.csv", "classes.json", "scored.csv")


def cache_of(folder: Path, clips: tuple[str, ...], names: tuple[str, ...], **more: object) -> FeatureCache:
    return write_cache(folder, labels=[names.index(name) for name in clips], names=names, **more)


def val_cache(folder: Path, names: tuple[str, ...], clips: tuple[str, ...] = VAL) -> FeatureCache:
    return cache_of(folder, clips, names, prefix="v", split="val", seed=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training cache, a validation cache of the same classes, and a run on both."""
    folder = tmp_path_factory.mktemp("trained")
    caches = cache_of(folder / "train", ORDER * 4, ORDER), val_cache(folder / "val", ORDER)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the tests have it, whose bits are compared with these
    train(*caches, options=OPTIONS, out=folder / "run")
    torch.set_num_threads(threads)
    return *caches, folder / "run"


def figures(result: EvalResult) -> list[float]:
    return [result.top1, result.top5, result.loss]


def permuted_by_hand(run: Path, out: Path, names: tuple[str, ...]) -> Path:
    """The run with the rows of its classifier, and the names of its classes, in another order."""
    shutil.copytree(run, out)
    config, head = read_run_config(run), load_head(run)
    rows = [config.classes.index(name) for name in names]
    with torch.no_grad():
        head.classifier.weight.copy_(head.classifier.weight[rows].clone())
        head.classifier.bias.copy_(head.classifier.bias[rows].clone())
    features = {**config.features, "classes": list(names)}
    write_run_config(out, replace(config, classes=names, features=features))
    save_head(out, head)
    return out


def test_the_order_of_a_cache_s_classes_changes_no_bit(trained, tmp_path):
    _, same, run = trained
    other = val_cache(tmp_path / "other", OTHER)
    assert figures(evaluate(run, other)) == figures(evaluate(run, same))
    by_hand = permuted_by_hand(run, tmp_path / "by-hand", OTHER)
    assert figures(evaluate(by_hand, other)) == figures(evaluate(run, other))
    assert figures(evaluate(by_hand, same)) == figures(evaluate(run, same))


def test_train_and_sweep_score_a_validation_cache_of_another_order_to_the_bit(trained, tmp_path):
    train_cache, same, run = trained
    other = val_cache(tmp_path / "other", OTHER)
    train(train_cache, other, options=OPTIONS, out=tmp_path / "run")
    swept = expand([{"head": ["linear"]}], {"epochs": OPTIONS.epochs, "lr": OPTIONS.lr, "batch": 4})
    for name, val in {"other": other, "same": same}.items():
        sweep(train_cache, val, runs=swept, out=tmp_path / f"sweep-{name}")
    of_sweep = [tmp_path / f"sweep-{name}" / "runs" / swept[0].name for name in ("other", "same")]
    for one, two in ((tmp_path / "run", run), of_sweep):
        assert [(one / name).read_bytes() for name in RUN_FILES] == [
            (two / name).read_bytes() for name in RUN_FILES
        ]
        losses = [[row["val_loss"] for row in read_json_lines(out / "metrics.jsonl")] for out in (one, two)]
        assert losses[0] == losses[1]


def test_validation_labels_may_be_fewer_than_those_trained_on(trained, tmp_path):
    train_cache, _, run = trained
    few = val_cache(tmp_path / "few", (RUN, JUMP), clips=(JUMP, RUN, RUN, JUMP, RUN))
    train(train_cache, few, options=OPTIONS, out=tmp_path / "run")
    table = (tmp_path / "run" / "confusion.csv").read_text().splitlines()
    assert table[0] == "class,clap,jump,run"
    assert table[1] == "clap,0,0,0"
    assert [sum(map(int, line.split(",")[1:])) for line in table[2:]] == [2, 3]
    whole = val_cache(tmp_path / "whole", ORDER, clips=(JUMP, RUN, RUN, JUMP, RUN))
    # The noise is the same, and so are the classes of the clips; their directions are not.
    assert evaluate(run, whole).val_clips == evaluate(run, few).val_clips == 5


def test_a_validation_class_that_is_not_trained_on_is_told_by_name(trained, tmp_path):
    train_cache, _, run = trained
    val = val_cache(tmp_path / "val", (CLAP, RUN, WALK), clips=(CLAP, RUN, WALK))
    message = r"other classes, matched by name: there is no class 'walk' \(but 'jump'\)"
    with pytest.raises(UsageError, match=message):
        train(train_cache, val, options=OPTIONS, out=tmp_path / "run")
    with pytest.raises(UsageError, match=r"matched by name: there is no class 'walk' \(but 'jump'\)"):
        evaluate(run, val)


def imported(run: Path, out: Path, names: tuple[str, ...]) -> Path:
    """The run as import-head would leave it: without features, and with these classes."""
    shutil.copytree(run, out)
    config = {**asdict(read_run_config(run)), "features": None, "caches": {}, "classes": list(names)}
    (out / "config.json").write_text(json.dumps({"format": 1, **config}))
    return out


def test_the_names_of_an_imported_head_decide(trained, tmp_path):
    _, val, run = trained
    right, wrong = (imported(run, tmp_path / names[0], names) for names in (ORDER, OTHER))
    assert figures(evaluate(right, val)) == figures(evaluate(run, val))
    assert evaluate(wrong, val).loss != evaluate(run, val).loss


@pytest.mark.parametrize(("head", "cache"), [(("0", "1", "2"), ORDER), (ORDER, ("0", "1", "2"))])
def test_numbers_are_told_apart_from_names(trained, tmp_path, head, cache):
    clips = tuple(cache[ORDER.index(name)] for name in VAL)
    val = write_cache(
        tmp_path / "val", labels=[cache.index(name) for name in clips], names=cache, prefix="v", seed=1
    )
    notes = []
    run = imported(trained[2], tmp_path / "imported", head)
    result = evaluate(run, val, on_note=notes.append)
    assert figures(result) == figures(evaluate(trained[2], trained[1]))
    (note,) = notes
    assert "by number" in note and str(tmp_path / "val") in note
    by_name = []
    evaluate(imported(trained[2], tmp_path / "named", cache), val, on_note=by_name.append)
    assert by_name == []


def test_a_trained_head_is_not_scored_by_number(trained, tmp_path):
    numbers = write_cache(tmp_path / "val", labels=[0, 1, 2], names=("0", "1", "2"), prefix="v")
    with pytest.raises(
        UsageError, match=r"3 classes with names .* cannot be compared with 3 classes that are"
    ):
        evaluate(trained[2], numbers)


@pytest.mark.parametrize(
    ("head", "cache", "numbers"),
    [
        (("a", "b", "c"), ("c", "a"), [2, 0]),
        (tuple(map(str, range(400))), tuple(map(str, range(388))), list(range(388))),
        (("air drumming", "Yo-Yo"), ("Yo Yo", "air_drumming"), [1, 0]),
        (("c", "c++"), ("c++",), [1]),
        (("0", "1", "10", "2"), ("0", "1", "2"), [0, 1, 3]),  # folders
        (("0.0", "1.0", "10.0", "2."), ("0", "1", "2"), [0, 1, 3]),  # trained before `1.0` was a number
        (("0", "1", "2"), ("0.0", "2.0"), [0, 2]),
        ((unicodedata.normalize("NFD", CAFE), "bar"), (CAFE,), [0]),
        (("-1", "1"), ("1",), [1]),
        (("passing football (in game)", "jump"), ("Passing_football_(in_game)",), [0]),
        (("front - crawl", "jump"), ("front_crawl",), [0]),
    ],
)
def test_names_are_matched(head, cache, numbers):
    match = match_classes(head, cache)
    assert match.numbers is not None and match.numbers.tolist() == numbers and not match.by_number
    labels = np.arange(len(cache))
    assert match.labels(labels).tolist() == numbers
    assert match_classes(head, head).labels(labels) is labels


@pytest.mark.parametrize(
    ("head", "cache", "message"),
    [
        (("a", "b"), ("a", "b", "c", "d", "e", "f"), "no class 'c', 'd', 'e' and 1 more$"),
        (("a", "a", "b"), ("b", "a"), "have the same name"),
        (("a_b", "a b", "c"), ("a-b",), "have the same name"),
        (("0", "1"), ("0", "1", "2"), "there is no class '2'$"),
        (("0", "1"), ("a", "b"), "2 classes that are numbers cannot be compared with 2 classes with names"),
        (("0", "1"), ("-1", "0"), r"no class '-1' \(but '1'\)"),
        (("1", "2"), ("-1.0",), "no class '-1.0'"),
        (("level 1", "level 2"), ("level -1",), "no class 'level -1'"),
        (("1.5", "2"), ("1",), "no class '1'"),
        (("private", "b"), ("_private",), "no class '_private'"),
    ],
)
def test_names_that_do_not_fit_are_refused(head, cache, message):
    with pytest.raises(UsageError, match=message):
        match_classes(head, cache)


@pytest.mark.parametrize(("head", "cache"), [(("0", "1"), ("a",)), (("a", "b"), ("0", "1", "2"))])
def test_numbers_that_do_not_fit_names_are_refused_even_where_they_may_have_some(head, cache):
    with pytest.raises(UsageError, match="cannot be compared"):
        match_classes(head, cache, numbers_may_have_names=True)


@pytest.mark.parametrize("folders_are_of", ["head", "cache"])
def test_folders_whose_names_are_numbers_are_not_compared_by_number(folders_are_of):
    sides = [tuple(map(str, range(11))), tuple(sorted(map(str, range(1, 12))))]  # "1", "10", "11", "2", …
    head, cache = sides if folders_are_of == "cache" else sides[::-1]
    lacking = "'11' (but '0')" if folders_are_of == "cache" else "'0' (but '11')"
    with pytest.raises(UsageError, match=f"^there is no class {re.escape(lacking)}$"):
        match_classes(head, cache, numbers_may_have_names=True)


def test_a_number_among_names_is_not_another_number():
    with pytest.raises(UsageError, match=r"^there is no class 'cat' \(but '1'\)$"):
        match_classes(("0", "1"), ("cat", "0"), numbers_may_have_names=True)


@pytest.mark.parametrize("K", [3, 7, 50, 401])
def test_a_loss_is_the_same_to_the_bit_in_any_order_of_classes(K):
    generator = torch.Generator().manual_seed(K)
    logits = 5 * torch.randn(64, K, generator=generator)
    labels = torch.randint(K, (64,), generator=generator)
    order = torch.randperm(K, generator=generator)
    sums = ViewSums(), ViewSums()
    sums[0].add_logits(logits, labels, range(64))
    sums[1].add_logits(logits[:, order], order.argsort()[labels], range(64))
    assert sums[0].loss == sums[1].loss
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
    assert sums[0].loss == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 100.0, 3000.0, 60000.0])
def test_the_loss_of_large_logits_is_that_of_small_ones_in_any_order_of_classes(offset):
    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)) * 8 + offset
    labels = torch.arange(64) % 40
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    loss = scored_loss(logits, labels)
    assert loss == scored_loss(logits[:, order], order.argsort()[labels])
    exact = float(torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum"))
    assert loss == pytest.approx(exact, rel=1e-6)
    sure = torch.nn.functional.one_hot(labels, 40) * 16.0 + offset  # the loss is small beside its terms
    exact = float(torch.nn.functional.cross_entropy(sure.double(), labels, reduction="sum"))
    assert scored_loss(sure, labels) == pytest.approx(exact, rel=0.03)  # as far as float32 goes


def scored_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The sum of losses of samples, each a clip of its own."""
    sums = ViewSums()
    sums.add_logits(logits, labels, range(len(labels)))
    return sums.loss


@pytest.mark.parametrize("names", [("extra", *ORDER), ORDER[:-1]])
def test_a_configuration_whose_names_are_not_as_many_as_its_heads_classes_is_refused(
    trained, tmp_path, names
):
    shutil.copytree(trained[2], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "classes": list(names)}))
    with pytest.raises(UsageError, match=rf"names {len(names)} classes, and its head has {len(ORDER)}"):
        read_run_config(tmp_path / "run")
