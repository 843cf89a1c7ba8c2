"""Where files that can be made again are kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_root() -> Path:
    """`TTSK_CACHE`, else `ttskernels` in the user's cache folder, as the platform has it."""
    if given := os.environ.get("TTSK_CACHE"):
        return Path(given).expanduser()
    home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or home).expanduser() / "ttskernels"
