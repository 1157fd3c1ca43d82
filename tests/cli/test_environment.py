"""Variables of the environment in the place of options: all are known, and a misspelt one is told."""

import os
import re
from pathlib import Path

import click
import pytest

from evl_cache_cli.environment import OTHERS
from evl_cache_cli.main import COMMANDS, cli, main
from tests.support.example_data import ROOT

# Names that code, docs and tests only make up, or that click itself heeds.
EXAMPLES = {"EVL_CACHE_", "EVL_CACHE_COMPLETE"}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EVL_CACHE_")]:
        monkeypatch.delenv(name)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    return int(str(ended.value.code)), capsys.readouterr().err


def test_a_misspelt_variable_of_a_command_is_an_error_that_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("EVL_CACHE_TRAIN_EPOCH", "3")
    status, said = run(capsys, "train", "--cache", str(tmp_path))
    assert status == 2
    assert said == (
        "error: EVL_CACHE_TRAIN_EPOCH: train has no such option; the nearest is EVL_CACHE_TRAIN_EPOCHS; "
        "correct it, or unset it; see evl-cache train --help\n"
    )
    assert run(capsys, "train", "--help")[0] == 0
    assert "EPOCH" not in run(capsys, "ls", str(tmp_path))[1], "other commands do not heed it"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_of_a_variable_that_is_none_of_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    name = f"EVL_CACHE_{command.upper().replace('-', '_')}_NOTHING_AT_ALL"
    monkeypatch.setenv(name, "3")
    found = cli.get_command(click.Context(cli), command)
    assert found is not None
    ctx = click.Context(cli, info_name="evl-cache", **cli.context_settings)
    required = [p for p in found.params if p.required]
    words = []
    for parameter in required:
        value = str(parameter.type.choices[0]) if isinstance(parameter.type, click.Choice) else "x"
        words += [parameter.opts[0], value] if isinstance(parameter, click.Option) else [value]
    with pytest.raises(click.UsageError, match=f"{name}: {command} has no such option"):
        found.make_context(command, words, parent=ctx)


def test_a_misspelt_command_is_told_of_and_the_command_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("EVL_CACHE_TRIAN_EPOCHS", "3")
    monkeypatch.setenv("EVL_CACHE_ROT", "3")
    monkeypatch.setenv("EVL_CACHE_TRAIN_EPOCHS", "3")
    monkeypatch.setenv("EVL_CACHE_EMPTY_ONE", "")
    status, said = run(capsys, "ls", str(tmp_path))
    assert status == 0
    assert said.splitlines()[:2] == [
        "note: EVL_CACHE_ROT is in the environment, and nothing heeds it; the nearest is EVL_CACHE_ROOT",
        "note: EVL_CACHE_TRIAN_EPOCHS is in the environment, and nothing heeds it; the nearest is EVL_CACHE_TRAIN_EPOCHS",
    ]


@pytest.mark.parametrize("name", ["EVL_CACHE_LS_JSON", "EVL_CACHE_LS_AS_JSON"])
def test_an_option_has_the_variable_of_its_flags_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit):
        main(["ls", str(tmp_path)])
    assert capsys.readouterr().out.lstrip().startswith("{")


def options_of_all_commands() -> set[str]:
    found = set()
    for command in COMMANDS:
        prefix = f"EVL_CACHE_{command.upper().replace('-', '_')}"
        made = cli.get_command(click.Context(cli), command)
        assert made is not None
        for option in made.params:
            names = [option.name or "", *(flag.lstrip("-").replace("-", "_") for flag in option.opts)]
            found |= {f"{prefix}_{name.upper()}" for name in names}
    return found


def test_every_variable_that_code_and_docs_name_is_known() -> None:
    files = [
        path
        for folder in ("evl_cache", "cli", "docs", "benchmarks", "tests", "tools", ".ci")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", "") and path.is_file() and path != Path(__file__)
    ]
    named = {
        name
        for path in files
        for name in re.findall(r"EVL_CACHE_[A-Z_]*\b", path.read_text(errors="replace"))
    }
    known = options_of_all_commands() | OTHERS.keys() | EXAMPLES
    assert len(named) > 15
    assert {name for name in named - known if not any(k.startswith(name) for k in known)} == set()
    assert {name for name, what in OTHERS.items() if what != "tests"} <= named
