"""A signal ends a command wherever it comes: in a callback whose exceptions Python drops, and while a thread is joined."""

import os
import subprocess
from typing import NoReturn

import pytest

from evl_cache_cli import main as main_module
from tests.support.example_data import ROOT
from tests.support.warm_python import warm_python


def run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [warm_python(), "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, env=os.environ
    )


# A command that asks itself to end in a callback, and then works on for long.
CODE = """
import os, signal, time, weakref
import click
from evl_cache_cli import main as commands

class Thing:
    pass

@click.command()
def command():
    thing = Thing()
    kept = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.{name}))
    del thing
    for _ in range(3000):
        time.sleep(0.01)
    print("went on")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
commands.cli = command
commands.main([])
"""

# A command that joins a thread which takes a moment to leave things as they should be left.
JOINS = """
import os, signal, threading, time
import click
from evl_cache_cli import main as commands

def work():
    time.sleep(0.2)
    os.kill(os.getpid(), signal.{name})
    time.sleep(0.3)
    print("left in order", flush=True)

@click.command()
def command():
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    time.sleep(30)
    print("went on")

signal.signal(signal.SIGINT, signal.default_int_handler)
commands.cli = command
commands.main([])
"""


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_thread_that_is_joined_ends_before_the_command(name: str, status: int) -> None:
    ended = run(JOINS.replace("{name}", name))
    assert (ended.returncode, ended.stdout) == (status, "left in order\n"), ended
    assert "Traceback" not in ended.stderr and "ignored" not in ended.stderr


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_in_a_callback_of_the_garbage_collection_ends_the_command(name: str, status: int) -> None:
    ended = run(CODE.replace("{name}", name))
    assert (ended.returncode, ended.stdout) == (status, ""), ended
    assert "Traceback" not in ended.stderr and "ignored" not in ended.stderr


def test_a_signal_while_an_error_is_told_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module.click, "echo", interrupted)
    with pytest.raises(SystemExit) as ended:
        main_module.main(["info", "no such cache"])
    assert ended.value.code == 130
