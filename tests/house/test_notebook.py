"""In a notebook: progress is shown though stderr is no terminal, and an error is its line."""

import sys
import types

import pytest

from evl_cache.errors import UsageError
from evl_cache.progress_lines import clip_progress, in_notebook, step_progress


class ZMQInteractiveShell:
    """The class name by which a Jupyter kernel is known."""


@pytest.fixture
def kernel(monkeypatch):
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: ZMQInteractiveShell()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)


def test_a_script_whose_stderr_is_no_terminal_is_left_alone(capsys):
    assert not in_notebook()
    with step_progress("train") as line:
        line(1, 2, 0.5)
    assert capsys.readouterr().err == ""


def test_a_kernel_shows_the_line(kernel, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no ipywidgets
    assert in_notebook()
    with step_progress("train") as line:
        line(1, 2, 0.5)
    with clip_progress(3, "extract") as clips:
        clips(False)
    shown = capsys.readouterr().err
    assert "train:  50%" in shown and "loss=0.500" in shown and "extract:  33%" in shown
    with clip_progress(3, "quiet", shown=False) as clips:
        clips(False)
    assert capsys.readouterr().err == ""


def test_ipython_itself_without_a_kernel_is_a_terminal(monkeypatch):
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert not in_notebook()


def test_a_notebook_shows_an_error_of_ours_as_one_line():
    assert UsageError("layers [9]; choose among 1 to 4")._render_traceback_() == [
        "UsageError: layers [9]; choose among 1 to 4"
    ]
