"""Waits for servers: bounded by time, told, ended from outside; what fails and may pass is asked for again."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path

import pytest

from evl_cache.errors import CacheError, Unreachable, UsageError, WaitEnded
from evl_cache.store.objects import waits
from evl_cache.store.objects.troubles import Trouble, retry_after_s, status_trouble
from evl_cache.store.objects.waits import Attempt, Server, waits_end_when
from tests.support.store_helpers import wait_until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(waits, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(waits, "_asked", [])
    monkeypatch.setattr(waits, "_answered", set())
    monkeypatch.setenv(
        "EVL_CACHE_SERVER_PATIENCE", "60"
    )  # no test waits so long, however slow the machine is


def refused() -> Trouble:
    return Trouble("nothing listens there", "start it", may_pass=True)


def never(attempt: Attempt) -> None:
    threading.Event().wait(60)


def fails(times: int, trouble: Callable[[], Exception] = refused) -> Callable[[Attempt], int]:
    """A request that fails so often, then returns how often it was made."""
    made = 0

    def request(attempt: Attempt) -> int:
        nonlocal made
        made += 1
        if made <= times:
            raise trouble()
        return made

    return request


def seconds_of(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def test_what_may_pass_is_asked_again_and_what_may_not_is_told_at_once() -> None:
    assert Server("a").ask("x", fails(3)) == 4
    lasting = fails(1, lambda: Trouble("is no cache server", "name another"))
    with pytest.raises(Unreachable, match=r"^x: is no cache server; name another$"):
        Server("a").ask("x", lasting)
    assert lasting(Attempt()) == 2  # it was not asked again


def test_patience_is_counted_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    request = fails(10**9)
    monkeypatch.setenv("EVL_CACHE_SERVER_PATIENCE", "2")

    def ask() -> None:
        with pytest.raises(Unreachable, match=r"^x: nothing listens there(, for \d+ s)?; start it$"):
            Server("a").ask("x", request)

    assert 1.9 < seconds_of(ask) < 20
    monkeypatch.setenv("EVL_CACHE_SERVER_PATIENCE", "soon")
    with pytest.raises(UsageError, match="EVL_CACHE_SERVER_PATIENCE is 'soon'; expected seconds"):
        Server("a").ask("x", request)


def test_a_server_that_has_answered_is_waited_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "_FIRST_PATIENCE_S", 1.5)
    monkeypatch.setenv("EVL_CACHE_SERVER_PATIENCE", "600")
    ready = threading.Event()

    def request(attempt: Attempt) -> int:
        if not ready.is_set():
            raise refused()
        return 1

    with pytest.raises(Unreachable):
        Server("a").ask("x", request)
    ready.set()
    assert Server("a").ask("x", request) == 1
    ready.clear()
    threading.Timer(2.0, ready.set).start()  # its restart
    assert Server("a").ask("x", request) == 1
    with pytest.raises(Unreachable):
        Server("another").ask("x", fails(10**9))


def test_retry_after_is_heeded_where_patience_allows_it() -> None:
    def busy(seconds: float) -> Callable[[], Trouble]:
        return lambda: status_trouble(503, {"retry-after": f"{seconds:.0f}"})

    with pytest.raises(Unreachable, match=r"answers 503 Service Unavailable.* asked again in 3600 s; run"):
        Server("a").ask("x", fails(1, busy(3600)))
    made = fails(1, lambda: Trouble("busy", "wait", may_pass=True, retry_after_s=0.2))
    assert seconds_of(lambda: Server("a").ask("x", made)) >= 0.2
    assert retry_after_s("7") == 7 and retry_after_s("soon") is None and retry_after_s(None) is None
    later = retry_after_s(formatdate(time.time() + 100, usegmt=True))
    assert later is not None and 90 < later <= 100
    assert retry_after_s(formatdate(0, usegmt=True)) == 0


@pytest.mark.parametrize("sends", [False, True])
def test_silence_and_a_trickle_end_a_request(monkeypatch: pytest.MonkeyPatch, sends: bool) -> None:
    monkeypatch.setenv("EVL_CACHE_SERVER_PATIENCE", "1.5")
    stopped = threading.Event()

    def request(attempt: Attempt) -> None:
        while not stopped.wait(0.01):
            if sends:
                attempt.came(1)

    expected = "its answer stopped half way" if sends else "it does not answer"
    with pytest.raises(Unreachable, match=rf"x: {expected}(, for \d+ s)?; check that"):
        Server("a").ask("x", request)
    stopped.set()


def test_what_was_answered_last_is_told_and_not_that_no_time_was_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EVL_CACHE_SERVER_PATIENCE", "4")
    answers = iter([refused])

    def request(attempt: Attempt) -> None:
        for answer in answers:
            time.sleep(2.0)  # of its time, half is left to the next
            raise answer()
        never(attempt)

    with pytest.raises(Unreachable, match=r"^x: nothing listens there"):
        Server("a").ask("x", request)


def test_while_this_process_stands_still_no_server_is_silent(tmp_path: Path) -> None:
    """Ctrl-Z, or a job that is suspended."""
    script = """if True:
        import sys, time
        from pathlib import Path
        from evl_cache.store.objects.waits import Server
        asked, answered = map(Path, sys.argv[1:])
        def request(attempt):
            asked.touch()
            while not answered.exists():
                time.sleep(0.01)
            return "answered"
        print(Server("a").ask("x", request))
    """
    asked, answered = tmp_path / "asked", tmp_path / "answered"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(asked), str(answered)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"EVL_CACHE_SERVER_PATIENCE": "3"},
    )  # fmt: skip
    wait_until(asked.exists, what="it asks")
    process.send_signal(signal.SIGSTOP)
    time.sleep(4.0)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.3)
    answered.touch()
    assert process.communicate(timeout=60)[0] == "answered\n"


def test_a_long_answer_that_comes_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "_SILENCE_S", 2.0)

    def request(attempt: Attempt) -> str:
        for _ in range(30):
            time.sleep(0.1)
            attempt.came(4096)
        return "whole"

    assert Server("a").ask("x", request) == "whole"


def test_a_wait_is_told_once_for_all_threads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waits, "_TOLD_AFTER_S", 0.05)
    monkeypatch.setenv("EVL_CACHE_SERVER_PATIENCE", "2")
    server = Server("a")

    def ask() -> None:
        with pytest.raises(Unreachable):
            server.ask("http://lab/\x1bx", never)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    with caplog.at_level(logging.WARNING, logger="evl_cache"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    (told,) = caplog.messages
    assert told.startswith("waiting for http://lab/\\x1bx: it does not answer; for up to ")


@pytest.mark.parametrize("request_", [never, fails(10**9)], ids=["silence", "pause"])
def test_waits_end_from_another_thread(
    monkeypatch: pytest.MonkeyPatch, request_: Callable[[Attempt], None]
) -> None:
    monkeypatch.setenv("EVL_CACHE_SERVER_PATIENCE", "600")
    monkeypatch.setattr(waits, "_FIRST_WAIT_S", 30.0)
    server, other = Server("a"), Server("b")
    threading.Timer(0.1, server.end_waits).start()
    with pytest.raises(WaitEnded, match=r"^x: no longer waited for$"):
        server.ask("x", request_)
    assert server.ask("x", fails(0)) == 1  # later calls wait again
    asked = threading.Event()
    threading.Timer(0.1, asked.set).start()
    with waits_end_when(asked.is_set), pytest.raises(WaitEnded):
        other.ask("x", request_)
    assert other.ask("x", fails(0)) == 1
    threading.Timer(0.1, waits.end_all_waits).start()
    with pytest.raises(WaitEnded):
        other.ask("x", request_)
    with pytest.raises(WaitEnded):
        server.ask("x", never)


def test_what_else_goes_wrong_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheError, match="too large"):
        Server("a").ask("x", fails(1, lambda: CacheError("too large")))
    with pytest.raises(FileNotFoundError):
        Server("a").ask("x", fails(1, FileNotFoundError))

    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with pytest.raises(
        CacheError, match=r"no thread for a request \(can't start new thread\); raise the limit"
    ):
        Server("a").ask("x", fails(0))
