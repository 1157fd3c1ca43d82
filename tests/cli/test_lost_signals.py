"""A signal ends a command even where it comes while Python runs a callback whose exceptions it drops."""

import os
import subprocess

import pytest

from tests.support.example_data import ROOT
from tests.support.warm_python import warm_python

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


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_in_a_callback_of_the_garbage_collection_ends_the_command(name: str, status: int) -> None:
    ended = subprocess.run(
        [warm_python(), "-c", CODE.replace("{name}", name)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=os.environ,
    )
    assert (ended.returncode, ended.stdout) == (status, ""), ended
    assert "Traceback" not in ended.stderr and "ignored" not in ended.stderr
