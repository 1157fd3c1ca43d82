"""Steps that are recorded and replayed: the same training, proved before it is used, and left out where it cannot be."""

import json
from dataclasses import replace

import pytest
import torch

import evl_cache.train.step_graph as module
import evl_cache.train.step_loss as step_loss
from evl_cache import load_head
from evl_cache.batches import FeatureLoader, samples_of_clips
from evl_cache.errors import UsageError
from evl_cache.heads import build_head
from evl_cache.processes import Processes, ProcessPlace
from evl_cache.runs.directory import load_state
from evl_cache.train.optimisation import Optimisation, StepRandom
from evl_cache.train.passes import Passes
from evl_cache.train.recorder import first_difference, recorder_of
from evl_cache.train.stage import TrainOptions, train
from evl_cache.train.step_graph import MOST_RECORDINGS, PROOFS, WARM_UP_STEPS, StepGraph, step_graph
from tests.support.fake_recorder import Adding, Constant, FakeRecorder, OutOfMemory, Unable, Unkeyed, Unseeded
from tests.support.feature_caches import write_cache, write_pair

OPTIONS = TrainOptions(
    head="decoder2", epochs=4, batch=4, lr=3e-3, seed=5
)  # three whole batches an epoch, and one clip
REPLAY = ["replay"]
RECORDING = ["apart", "record"]
PROOF = ["apart", "replay"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("caches"))


@pytest.fixture
def recorded(monkeypatch):
    """Have trainings record with a recorder of the class given; returns what it did, and what was said."""

    def use(made):
        events, real = [], module.StepGraph

        def graph(passes, head, recorder, **more):
            recorder.head = head
            return real(passes, head, recorder, **more)

        def recorder_of(device):
            recorder = made(None)
            recorder.events = events
            return recorder

        monkeypatch.setattr(module, "recorder_of", recorder_of)
        monkeypatch.setattr(module, "StepGraph", graph)
        return events

    return use


def run(caches, out, *, options=OPTIONS, **more):
    losses, said = {}, []
    train(
        *caches,
        options=options,
        out=out,
        on_step=lambda done, total, loss: losses.update({done: loss}),
        on_note=said.append,
        **more,
    )
    return losses, said


def same_run(a, b):
    heads = [load_head(path).state_dict() for path in (a, b)]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    rows = [[json.loads(line) for line in (path / "steps.jsonl").read_text().splitlines()] for path in (a, b)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"precision": "bfloat16", "label_smoothing": 0.1, "grad_clip": 1.0, "ema": 0.9},
        {"precision": "float16", "epochs": None, "steps": 14},
        {"head": "linear"},
        {"save_every_steps": 1},
    ],
    ids=lambda how: " ".join(how) or "plain",
)
@pytest.mark.parametrize("is_late", [False, True], ids=["", "late"])
def test_a_recorded_training_is_the_training(caches, tmp_path, recorded, monkeypatch, how, is_late):
    options = replace(OPTIONS, **how)
    plain, _ = run(caches, tmp_path / "plain", options=options)
    monkeypatch.setattr(step_loss, "is_read_late", lambda device: is_late)
    events = recorded(FakeRecorder)
    found, said = run(caches, tmp_path / "recorded", options=options)
    assert found == plain and said == []
    same_run(tmp_path / "plain", tmp_path / "recorded")
    whole = sum(step % 4 != 0 for step in found)  # the fourth batch of an epoch is smaller
    replays = whole - WARM_UP_STEPS - PROOFS
    assert events == [*RECORDING, *PROOF * PROOFS, *REPLAY * replays] and replays > 0


@pytest.mark.parametrize("wrong", [Constant, Unseeded, Unkeyed, Adding])
def test_a_wrong_replay_is_never_used(caches, tmp_path, recorded, wrong):
    plain, _ = run(caches, tmp_path / "plain")
    events = recorded(wrong)
    found, said = run(caches, tmp_path / "recorded")
    assert found == plain
    same_run(tmp_path / "plain", tmp_path / "recorded")
    (line,) = said
    assert line.startswith("no CUDA graph of the step, training goes on without (replayed, the ")
    assert events[-1] == "forget" and events.count("replay") <= PROOFS


@pytest.mark.parametrize(
    ("unable", "reason"),
    [
        (Unable, "operation not permitted when stream is capturing"),
        (OutOfMemory, "CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_what_cannot_be_recorded_is_trained_without_and_said_once(caches, tmp_path, recorded, unable, reason):
    plain, _ = run(caches, tmp_path / "plain")
    events = recorded(unable)
    found, said = run(caches, tmp_path / "recorded")
    assert found == plain
    same_run(tmp_path / "plain", tmp_path / "recorded")
    assert said == [f"no CUDA graph of the step, training goes on without ({reason})"]
    assert events[-1] == "forget" and events.count("record") == 1


def test_an_error_of_the_step_itself_is_the_steps(caches, tmp_path, recorded, monkeypatch):
    recorded(FakeRecorder)
    real, calls = Passes.take, []

    def fails(self, *args, **more):
        calls.append(1)
        if len(calls) > WARM_UP_STEPS + 1:
            raise UsageError("no such layer")
        return real(self, *args, **more)

    monkeypatch.setattr(Passes, "take", fails)
    with pytest.raises(UsageError, match="no such layer"):
        run(caches, tmp_path / "run")


def test_a_resumed_run_records_anew_and_goes_on_the_same(caches, tmp_path, recorded):
    plain, _ = run(caches, tmp_path / "plain")
    events = recorded(FakeRecorder)
    saving = replace(OPTIONS, save_every_steps=1)

    class Killed(Exception):
        pass

    def die(done, total, loss):
        if done == 11:
            raise Killed

    with pytest.raises(Killed):
        train(*caches, options=saving, out=tmp_path / "cut", on_step=die)
    assert "replay" in events and load_state(tmp_path / "cut")["progress"]["step"] == 10
    events.clear()
    rest, _ = run(caches, tmp_path / "cut", options=saving, resume=True)
    assert rest == {step: loss for step, loss in plain.items() if step > 10}
    assert events[0] == "forget" and "record" not in events[:1]


@pytest.mark.parametrize(
    ("how", "world", "said"),
    [
        ({"cuda_graph": False}, 1, 0),
        ({"accumulate": 2}, 1, 0),
        ({"accumulate": 2, "cuda_graph": True}, 1, 1),
        ({}, 2, 0),
        ({"cuda_graph": True}, 2, 1),
    ],
)
def test_other_trainings_are_not_recorded(monkeypatch, how, world, said):
    monkeypatch.setattr(module, "recorder_of", lambda device: pytest.fail("asked for a recorder"))
    notes = []
    processes = Processes(place=ProcessPlace(world=world))
    options = replace(OPTIONS, **how)
    assert step_graph(None, torch.nn.Linear(1, 1), options, processes, notes.append) is None
    assert len(notes) == said


def test_a_cpu_records_nothing():
    assert recorder_of(torch.device("cpu")) is None
    head, said = torch.nn.Linear(1, 1), []
    assert step_graph(None, head, OPTIONS, Processes(), said.append) is None and said == []
    assert step_graph(None, head, replace(OPTIONS, cuda_graph=True), Processes(), said.append) is None
    assert said == ["no CUDA graph of the step: cpu has none"]


# Where batches lie


class Steps:
    """Steps of a recorded head, beside the same steps of one that is not."""

    def __init__(self, tmp_path):
        cache = write_cache(tmp_path / "cache", labels=(0, 1, 2, 0, 1, 2, 0, 1))
        self.loader = FeatureLoader(
            cache, samples_of_clips(cache, None), layers=(3, 4), batch=4, shuffle_seed=1
        )
        self.recorders, self.sides, self.said = [], [], []
        for _ in range(2):
            torch.manual_seed(0)
            config = {"width": 16, "num_frames": 3, "grid": (2, 2), "num_classes": 3, "num_heads": 2}
            head = build_head("decoder2", num_layers=2, **config)
            optimisation = Optimisation(head, OPTIONS, total_steps=99)
            self.sides.append((head, optimisation, Passes(head, optimisation, OPTIONS, Processes())))
        head, _, passes = self.sides[0]
        self.recorder = FakeRecorder(head)
        self.graph = StepGraph(
            passes, head, self.recorder, batch=4, precision="float32", on_note=self.said.append
        )
        self.step = 0

    def take(self, batch):
        """Take a step with both; returns what the recorder did."""
        before, losses = len(self.recorder.events), []

        random = StepRandom(seed=5, step=self.step, rank=0)
        for place, (_, optimisation, passes) in enumerate(self.sides):
            optimisation.begin(self.step)
            loss = self.graph.loss(batch, random) if place == 0 else None
            if loss is None:
                random.begin()
                loss = passes.run(batch, random)
            optimisation.finish(self.step)
            losses.append(float(loss))
        self.step += 1
        assert losses[0] == losses[1]
        for mine, theirs in zip(self.sides[0][0].parameters(), self.sides[1][0].parameters(), strict=True):
            assert torch.equal(mine, theirs)
        return self.recorder.events[before:]


class Places:
    """Batches of a loader in fixed places, as a device feed has them."""

    def __init__(self, count):
        self.count, self.places, self.number = count, {}, 0

    def put(self, batch):
        slot = self.number % self.count
        self.number += 1
        if slot not in self.places:
            self.places[slot] = (batch.features.repeated(len(batch.labels)), batch.labels.clone())
        features, labels = self.places[slot]
        for mine, theirs in zip(features.tensors(), batch.features.tensors(), strict=True):
            mine.copy_(theirs)
        labels.copy_(batch.labels)
        return replace(batch, features=features, labels=labels, slot=slot)


def test_each_place_of_batches_has_a_recording_and_nothing_is_copied(tmp_path):
    steps, places = Steps(tmp_path), Places(2)
    events = [steps.take(places.put(batch)) for epoch in range(6) for batch in steps.loader.epoch(epoch)]
    assert events[:WARM_UP_STEPS] == [[]] * WARM_UP_STEPS
    assert events[WARM_UP_STEPS:] == [
        *[[*RECORDING, *PROOF]] * 2,
        *[PROOF] * 2,
        *[REPLAY] * (12 - WARM_UP_STEPS - 4),
    ]
    for slot, recording in steps.graph._recordings.items():
        assert [t.data_ptr() for t in recording.features.tensors()] == [
            t.data_ptr() for t in places.places[slot][0].tensors()
        ]


def test_a_place_that_moved_is_recorded_anew_until_that_is_too_often(tmp_path):
    steps = Steps(tmp_path)
    events = [steps.take(Places(1).put(batch)) for epoch in range(8) for batch in steps.loader.epoch(epoch)]
    assert events[WARM_UP_STEPS:][:MOST_RECORDINGS] == [[*RECORDING, *PROOF]] * MOST_RECORDINGS
    assert events[WARM_UP_STEPS + MOST_RECORDINGS] == ["forget"] and events[-1] == []
    assert steps.said == [
        f"no CUDA graph of the step, training goes on without (batches lay in {MOST_RECORDINGS} places, and now in another)"
    ]


def test_a_smaller_batch_between_recorded_ones_changes_nothing(tmp_path):
    steps = Steps(tmp_path)
    for epoch in range(4):
        for batch in steps.loader.epoch(epoch):
            steps.take(batch)
            smaller = replace(
                batch,
                features=batch.features.part(0, 3),
                labels=batch.labels[:3],
                samples=batch.samples[:3],
                total=3,
            )
            assert steps.take(smaller) == []
    assert steps.recorder.events[-1] == "replay"


def test_a_stand_in_is_not_recorded(tmp_path):
    steps = Steps(tmp_path)
    for epoch in range(4):
        for batch in steps.loader.epoch(epoch):
            assert steps.take(replace(batch, is_stand_in=True)) == []


def test_loading_a_state_drops_what_was_recorded(tmp_path):
    steps = Steps(tmp_path)
    batches = [batch.clone() for epoch in range(4) for batch in steps.loader.epoch(epoch)]
    for batch in batches[:6]:
        steps.take(batch)
    steps.graph.forget()
    assert steps.take(batches[6]) == [*RECORDING, *PROOF]


# What counts as the same


def test_values_may_differ_by_rounding_alone():
    expected = [torch.tensor(2.0), torch.tensor([1.0, -4.0, 0.0]), None, torch.tensor([1e-9, 0.0])]
    names = ["loss", "a", "b", "c"]

    def differing(place, value, tolerance=1e-4):
        found = [None if e is None else e.clone() for e in expected]
        found[place] = value
        return first_difference(names, found, expected, tolerance=tolerance)

    assert differing(0, torch.tensor(2.0)) is None
    assert differing(1, torch.tensor([1.0, -4.0003, 0.0003])) is None
    assert differing(1, torch.tensor([1.0, -4.0, 0.001])) == "a"
    assert differing(3, torch.tensor([-1e-9, 1e-9])) is None  # rounding of what is zero in theory
    assert differing(3, torch.tensor([1e-2, 0.0])) == "c"
    assert differing(2, torch.tensor([0.0])) == "b" and differing(1, None) == "a"
    assert differing(0, torch.tensor(float("nan"))) == "loss"
    assert differing(1, torch.tensor([1.0, float("inf"), 0.0])) == "a"


def test_values_that_are_no_numbers_on_both_sides_are_the_same():
    # A gradient scaler begins with a scale under which float16 overflows.
    values = [torch.tensor([float("inf"), 1.0, float("nan"), -float("inf")])]
    assert first_difference(["a"], [values[0].clone()], values, tolerance=1e-4) is None
    other = torch.tensor([-float("inf"), 1.0, float("nan"), -float("inf")])
    assert first_difference(["a"], [other], values, tolerance=1e-4) == "a"
