"""The command line of the checkout, whether or not the package is installed."""

import importlib
import importlib.util
import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main_function() -> Callable[[list[str]], None]:
    """The console script's function. The folder cli/ is installed as `evl_cache_cli`; uninstalled it is found here."""
    if "evl_cache_cli" not in sys.modules and importlib.util.find_spec("evl_cache_cli") is None:
        folder = ROOT / "cli"
        spec = importlib.util.spec_from_file_location(
            "evl_cache_cli", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules["evl_cache_cli"] = package
        spec.loader.exec_module(package)
    function: Callable[[list[str]], None] = importlib.import_module("evl_cache_cli.main").main
    return function


def run_command(*arguments: str) -> tuple[int, str, str]:
    """Run a command in this process. Return its exit status, and what it wrote to stdout and stderr."""
    main, out, err = main_function(), io.StringIO(), io.StringIO()
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    status: object = 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    finally:
        signal.signal(signal.SIGTERM, handler)
        os.environ.clear()
        os.environ.update(environment)
    return status if isinstance(status, int) else 1, out.getvalue(), err.getvalue()
