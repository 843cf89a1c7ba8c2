"""Where files that can be made again are kept."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """`TTSK_CACHE`, else `ttskernels` in the user's cache folder, as the platform has it.

    Raises:
        OSError: the user has no home folder.
    """
    try:
        if given := os.environ.get("TTSK_CACHE"):
            return Path(given).expanduser()
        if given := os.environ.get("XDG_CACHE_HOME"):
            return Path(given).expanduser() / "ttskernels"
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "ttskernels"
    except RuntimeError as error:
        raise FileNotFoundError(f"there is no folder to keep files in ({error}); set TTSK_CACHE to one") from error


def keep(file: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make `file` in a folder beside it and move it to its place: others see it whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.stem}-", dir=file.parent) as fresh:
        write(Path(fresh) / file.name)
        (Path(fresh) / file.name).replace(file)
