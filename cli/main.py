"""`evl-cache`: the commands, found by name and loaded when called, so that `--help` answers at once."""

import contextlib
import importlib
import io
import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

import click

from evl_cache import __version__
from evl_cache.errors import EvlCacheError, UsageError, WeightsError, WeightsUnavailable
from evl_cache.notation import without_logins

from . import lost_signals
from .common import printable

# section -> name -> (module, one line of help); the module's `command` is loaded only when it is called
SECTIONS = {
    "Extract, once": {
        "check": ("check", "What extract would work on: clips, classes, files amiss."),
        "extract": ("extract", "Run the frozen backbone once over every clip."),
        "estimate": ("estimate", "What extract with the same options would cost."),
    },
    "Train, again and again": {
        "train": ("train", "Train a head from a cache."),
        "sweep": ("sweep", "Train many heads in one pass over a cache: ablations."),
        "eval": ("evaluate", "Score a run's head on a cache."),
        "import-head": ("import_head", "Turn a checkpoint of the official EVL code into a run."),
    },
    "Look": {
        "predict": ("predict", "Raw videos to labels, with a run's own tower and views."),
        "show": ("show", "A clip as the tower and a run's head see it, as a picture."),
        "report": ("report", "One page of runs and sweeps: curves, ablation, mistakes."),
    },
    "Keep and share caches": {
        "info": ("info", "What a cache holds, how complete it is, what failed."),
        "ls": ("ls", "Caches there are, here and on shared disks and servers."),
        "verify": ("verify", "Prove every byte; exit status 1 where damage is found."),
        "index": ("index", "Write the index from which a large cache opens in a second."),
        "repair": ("repair", "Redo only what verify finds damaged."),
        "push": ("push", "Copy a cache to a directory or to s3://."),
        "pull": ("pull", "Copy a cache, or layers of it, from anywhere."),
        "card": ("card", "Write a cache's README.md as data hubs expect it."),
    },
    "Try it": {
        "demo": ("demo", "The whole method on rendered clips; needs no download."),
        "render": ("render", "Draw a benchmark's clips: H.264 files by seed."),
    },
}
COMMANDS = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


class LazyGroup(click.Group):
    """A group whose commands' modules are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of the work, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command's object."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{COMMANDS[cmd_name][0]}", __package__)
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The tables of commands, without importing them."""
        width = max(map(len, COMMANDS))
        for title, section in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), text) for name, (_, text) in section.items()])


@click.group(
    cls=LazyGroup,
    context_settings={
        "auto_envvar_prefix": "EVL_CACHE",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
    },
)
@click.version_option(__version__, prog_name="evl-cache")
def cli() -> None:
    """Frozen image backbones for video: features cached once, heads trained in minutes.

    \b
    evl-cache extract --dataset k400 --layers 8-12
    evl-cache train --dataset k400 --head decoder4

    Every option can be set in the environment: EVL_CACHE_EXTRACT_MODEL is extract's --model.
    """


def main(args: list[str] | None = None) -> None:
    """The console script: a user's mistake is one line and an exit status, never a traceback."""
    if threading.current_thread() is threading.main_thread():  # no other may say what a signal does
        signal.signal(signal.SIGTERM, _terminate)
        lost_signals.come_again()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # neither ignored nor another's
            signal.signal(signal.SIGINT, _interrupt)
    # Before torch is loaded: threads that spin while others (decoders, encoders, another job) hold the core made
    # small operations three times slower on two cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A name that the terminal's encoding has not ends no command; Python does so for stderr by itself. A stream that
    # cannot be told so stays as it is.
    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(OSError):
            sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _run(args)
    except KeyboardInterrupt:  # while an error was told: a traceback would hide it
        sys.exit(130)


def _run(args: list[str] | None) -> NoReturn:
    """Run a command, tell its error, and end."""
    try:
        status = cli.main(args=args, prog_name="evl-cache", standalone_mode=False)
    except click.exceptions.Abort:
        _fail("interrupted; run the same command again to go on", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = "" if context is None else f"; see {context.command_path} --help"
        _fail(error.format_message().rstrip(".") + hint, error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on", 130)
    except EvlCacheError as error:
        _show_if_debugging()
        wrong_use = isinstance(error, UsageError | WeightsError) and not isinstance(error, WeightsUnavailable)
        _fail(str(error), 2 if wrong_use else 1)
    except MemoryError:
        _show_if_debugging()
        _fail("not enough memory; use a smaller --batch, or fewer layers or processes", 1)
    except ImportError as error:
        if "failed to map segment" not in str(error):
            raise
        _show_if_debugging()
        _fail(f"no memory for a library ({error}); raise the limit of memory of a process (ulimit -v)", 1)
    except OSError as error:
        _show_if_debugging()
        _fail(
            f"{error.filename or 'input or output'}: {error.strerror or error}; check the path, its permissions and the disk",
            1,
        )
    sys.exit(status if isinstance(status, int) else 0)


def _terminate(number: int, frame: FrameType | None) -> None:
    # As an exception, so that staged files are removed and locks released on the way out.
    _end_waits()
    if not lost_signals.is_put_off(number, frame):
        sys.exit(128 + number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _end_waits()
    if not lost_signals.is_put_off(number, frame):
        signal.default_int_handler(number, frame)


def _end_waits() -> None:
    """Have other threads no longer wait for servers: the process ends only when they do. Unless loaded, none waits."""
    if (waits := sys.modules.get("evl_cache.store.objects.waits")) is not None:
        waits.end_all_waits()


def _fail(message: str, status: int) -> None:
    click.echo(f"error: {printable(message)}", err=True)
    sys.exit(status)


def _show_if_debugging() -> None:
    if os.environ.get("EVL_CACHE_DEBUG"):
        import traceback

        click.echo(without_logins(traceback.format_exc()), err=True, nl=False)


if __name__ == "__main__":
    main()
