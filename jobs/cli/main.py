"""The `flashu` command: which commands there are, and what becomes of their errors.

Commands import what they need when they run, so that `flashu --help` answers at once.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import suppress

import typer

from cluster.session import SessionError
from cluster.storage import StorageError
from flashu.errors import InputError, OutOfMemoryError
from jobs.cli import acceleration, benchmarks, manifests, pictures, reproduce, runs
from manifests.errors import ManifestError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="""Text to images with Show-o2, accelerated by FlashU.

    Try it, with no download and no GPU:

        flashu generate "a red circle" -o out.png
        flashu ask out.png "What colour is the circle?"

    With the released model:

        flashu generate "a red fox" -o fox.png --model showlab/show-o2-1.5B
    """,
)

for command in (pictures.generate, pictures.ask, pictures.convert):
    app.command()(command)
app.command(context_settings={"ignore_unknown_options": True})(runs.run)  # so that --section.key=value is answered
app.command()(runs.submit)
app.command()(runs.status)
app.command()(runs.report)
app.command("filter")(runs.filter_)
app.add_typer(manifests.app, name="manifest")
app.add_typer(benchmarks.dpg, name="dpg")
app.add_typer(benchmarks.geneval, name="geneval")
app.add_typer(reproduce.app, name="reproduce")
app.command()(acceleration.plan)
app.command()(acceleration.calibrate)
app.add_typer(acceleration.analyze, name="analyze")


def main() -> None:
    """Run the command; what a user can mend is told in one line, without a traceback."""
    warnings.showwarning = lambda message, *_: typer.echo(f"flashu: warning: {message}", err=True)
    try:
        _check_letters()
        app()
    except (InputError, ManifestError, StorageError, SessionError, OutOfMemoryError) as error:
        typer.echo(f"flashu: {error}", err=True)
        sys.exit(1 if isinstance(error, OutOfMemoryError) else 2)
    except RuntimeError as error:
        from flashu.devices import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        typer.echo("flashu: out of memory; try a smaller model or size, or a device with more", err=True)
        sys.exit(1)


def _check_letters() -> None:
    """Let a terminal show letters that it has not as escapes. Raises `InputError` for arguments that are no text."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # what stands in for them in a notebook, or a test
            stream.reconfigure(errors="backslashreplace")
    for argument in sys.argv[1:]:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):  # bytes that Python could not read
            shown = argument.encode("utf-8", "backslashreplace").decode()
            raise InputError(f"{shown} is no text in this terminal's encoding; set its locale, or rename the file")
