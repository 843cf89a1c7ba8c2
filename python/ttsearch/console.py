"""What the commands share: where they print, and how they end on a wrong argument."""

from __future__ import annotations

from contextlib import contextmanager

import typer
from rich.console import Console

INTERRUPTED = 130  # exit status of a program ended by Ctrl-C

out, err = Console(), Console(stderr=True)


@contextmanager
def friendly_errors():
    """A wrong argument gets its message, not a traceback."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_expected(error):
            raise
        err.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None


def _is_expected(error: RuntimeError) -> bool:
    from ttskernels.errors import OutOfPagesError, UnavailableError

    return isinstance(error, (OutOfPagesError, UnavailableError))
