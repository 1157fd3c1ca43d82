"""The command reference is what the commands say of themselves."""

import pytest
from click.testing import CliRunner

from evl_cache_cli.main import COMMANDS
from tools import command_reference


def test_the_command_reference_is_up_to_date():
    assert command_reference.PATH.read_text(encoding="utf-8") == command_reference.reference(), (
        "run python -m tools.command_reference --write"
    )


def test_the_command_reference_holds_every_command_and_does_not_follow_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    made = command_reference.reference()
    monkeypatch.setenv("COLUMNS", "40")
    assert command_reference.reference() == made
    for name in COMMANDS:
        assert f"## evl-cache {name}\n" in made and f"Usage: evl-cache {name} " in made
    assert max(map(len, made.splitlines())) <= 120


@pytest.mark.parametrize("content", [None, "old", "equal"])
def test_check_finds_a_reference_that_is_not_current(tmp_path, monkeypatch, content):
    path = tmp_path / "commands.md"
    monkeypatch.setattr(command_reference, "PATH", path)
    runner = CliRunner()
    if content == "equal":
        assert runner.invoke(command_reference.main, ["--write"]).exit_code == 0
    elif content is not None:
        path.write_text(content)
    result = runner.invoke(command_reference.main, ["--check"])
    assert result.exit_code == (0 if content == "equal" else 1)
    assert ("run python -m tools.command_reference --write" in result.output) == (content != "equal")


def test_without_options_it_is_printed_and_nothing_written(tmp_path, monkeypatch):
    monkeypatch.setattr(command_reference, "PATH", tmp_path / "commands.md")
    result = CliRunner().invoke(command_reference.main, [])
    assert result.output == command_reference.reference() and not any(tmp_path.iterdir())
