"""The program: its groups of verbs, how it ends, and what all verbs print with."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

import typer
from rich.console import Console

from data_pipeline.errors import GenattError

app = typer.Typer(
    help="Train generative-attention recommenders: TorchRec tables, DeepSpeed dense layers, Ray Data shards.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
study = typer.Typer(help="Train and compare several models under one protocol.", no_args_is_help=True)
app.add_typer(study, name="study")
bench = typer.Typer(help="Measure what things cost on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")
_INTERRUPTED, _TERMINATED = 130, 143


def examples(*lines: str) -> str:
    """The end of a verb's help."""
    return "Examples:\n\n" + "\n\n".join(f"  $ {line}" for line in lines)


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, a run stopped by a signal that can go on
    75, other work stopped by Ctrl-C 130 and by SIGTERM 143; a traceback is a bug.
    """
    terminated = threading.Event()

    def terminate(*_: object) -> None:
        terminated.set()
        raise KeyboardInterrupt  # all is tidied up as after Ctrl-C; Ray knows no other exception of a handler

    signal.signal(signal.SIGTERM, terminate)
    try:
        code = app(standalone_mode=False)
    except GenattError as error:
        code = _tell(str(error), error.exit_code)
    except Exception as error:
        # A wrong option. Its class has no public name that all versions of typer share, but the method is theirs alone.
        if not hasattr(error, "format_message"):
            raise
        if not (message := " ".join(error.format_message().split())):
            sys.exit(GenattError.exit_code)  # no arguments at all: the help was printed
        context = getattr(error, "ctx", None)
        code = _tell(f"{message.rstrip('.')}: see {context.command_path if context else 'genatt'} --help")
    if code == _INTERRUPTED:
        stderr().print("stopped", style="red")
        code = _TERMINATED if terminated.is_set() else code
    sys.exit(code)


def _tell(message: str, code: int = GenattError.exit_code) -> int:
    stderr().print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    return code


def stderr() -> Console:
    """Where everything goes that is not a result."""
    return Console(stderr=True)


def progress(unit: str, total: int | None = None) -> Any:
    """A context that gives a function to move a progress bar on stderr by some units."""
    from contextlib import contextmanager

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    @contextmanager
    def bar() -> Any:
        console = stderr()
        columns = (
            BarColumn(),
            TextColumn("{task.completed:,.0f} " + unit),
            TextColumn("{task.speed:,.0f}/s"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
            task = shown.add_task("", total=total)
            yield lambda amount: shown.update(task, advance=amount)

    return bar()
