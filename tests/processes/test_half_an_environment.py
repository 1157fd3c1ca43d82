"""An environment that is half torchrun's, or that no run can have, is one line; so is a port that another program has."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from evl_cache.errors import UsageError
from evl_cache.processes import ProcessPlace, Rendezvous, processes_of_environment
from evl_cache_cli.main import main

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT", "SLURM_PROCID", "SLURM_LOCALID",
)  # fmt: skip
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
FIRST = {"RANK": "0", "WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


PLACES = [
    (
        {"RANK": "0"},
        "RANK is set and WORLD_SIZE is not; start several processes with torchrun, or unset RANK",
    ),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not; "),
    ({"WORLD_SIZE": "1"}, "WORLD_SIZE is set and RANK is not; "),
    ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK is 5 of a WORLD_SIZE of 2; expected 0 to 1; "),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 of a WORLD_SIZE of 2; "),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'; expected a number, 0 or more; "),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; expected a number, 1 or more; "),
    ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'; expected a number, 1 or more; "),
    ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'; expected a number"),
    ({"RANK": "0", "WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'; expected a number"),
    ({"RANK": "0", "WORLD_SIZE": "²"}, "WORLD_SIZE is '²'; expected a number"),
    ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "expected a number"),
    ({**FIRST, "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'; expected a number, 0 or more; "),
    ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'; expected a number, 0 or more; "),
    ({**FIRST, "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is 2 of a LOCAL_WORLD_SIZE of 2; "),
    ({**FIRST, "LOCAL_WORLD_SIZE": "none"}, "LOCAL_WORLD_SIZE is 'none'; expected a number, 1 or more; "),
    ({**FIRST, "TORCHELASTIC_RESTART_COUNT": ""}, None),
    ({**FIRST, "TORCHELASTIC_RESTART_COUNT": "-"}, "TORCHELASTIC_RESTART_COUNT is '-'; expected a number"),
    ({"RANK": "", "WORLD_SIZE": ""}, None),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "5"}, None),  # of GPUs that others have the first ones of
]
MEETINGS = [
    (FIRST, "MASTER_ADDR is not set, so that the processes of this run (WORLD_SIZE 2) cannot meet; "),
    ({**FIRST, "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set, so that "),
    ({**FIRST, "MASTER_PORT": "29500"}, "MASTER_ADDR is not set, so that "),
    *(
        ({**FIRST, **MEETING, "MASTER_PORT": port}, f"MASTER_PORT is '{port}'; expected a port, 1 to 65535: ")
        for port in ("http", "0", "-1", "65536", "29500x", "²", "9" * 30)
    ),
]


@pytest.mark.parametrize(("variables", "said"), PLACES)
def test_numbers_of_processes_that_cannot_be_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str | None
) -> None:
    set_all(monkeypatch, variables)
    if said is None:
        place = ProcessPlace.of_environment()
        assert place.rank < place.world
        return
    with pytest.raises(UsageError) as raised:
        ProcessPlace.of_environment()
    assert said in str(raised.value)


@pytest.mark.parametrize(("variables", "said"), MEETINGS)
def test_processes_that_cannot_meet_are_refused_before_they_wait(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    set_all(monkeypatch, variables)
    with pytest.raises(UsageError) as raised, processes_of_environment():
        pass
    assert str(raised.value).startswith(said)


@pytest.mark.parametrize(
    ("variables", "said"),
    [row for row in [*PLACES, *MEETINGS] if row[1] is not None and len(str(row[0])) < 300],
)
def test_train_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    variables: dict[str, str],
    said: str,
) -> None:
    set_all(monkeypatch, variables)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--cache", "a", "--val-cache", "b", "--head", "linear", "--device", "cpu"])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and said in told, told


def test_extract_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_all(monkeypatch, {"RANK": "5", "WORLD_SIZE": "2"})
    words = ["extract", "--dataset", "list", "--list", "none", "--layers", "2"]
    for said, more in (
        ("RANK is 5 of", {}),
        ("MASTER_PORT is 'x'", {**MEETING, "RANK": "1", "MASTER_PORT": "x"}),
    ):
        set_all(monkeypatch, more)
        with pytest.raises(SystemExit) as ended:
            main(words)
        told = capsys.readouterr().err
        assert ended.value.code == 2 and told.count("\n") == 1 and said in told, told


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port that another program listens at; it is that of the run."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = int(other.getsockname()[1])
        set_all(monkeypatch, {**FIRST, **MEETING, "MASTER_PORT": str(port)})
        yield port


def test_a_port_that_another_program_has_is_told_with_what_to_do(taken: int) -> None:
    with (
        pytest.raises(
            UsageError, match=f"^MASTER_PORT {taken} is in use on this computer.*choose another MASTER_PORT"
        ),
        processes_of_environment(timeout_s=20),
    ):
        pass


def test_an_extraction_goes_on_by_the_locks_where_the_port_is_anothers(taken: int) -> None:
    lost, told = threading.Event(), []

    def note(reason: str) -> None:
        told.append(reason)
        lost.set()

    rendezvous = Rendezvous.of_environment(ProcessPlace(rank=0, world=2), on_lost=note, patience_s=60)
    assert rendezvous is not None
    assert [rendezvous.next("blocks") for _ in range(2)] == [None, None]
    assert lost.is_set()
    assert (
        told[0].startswith(f"MASTER_PORT {taken} is in use on this computer") and "choose another" in told[0]
    )
