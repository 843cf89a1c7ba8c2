"""PRM families as data, their detection, and the text they read; `session` runs them, and needs torch."""

from .detect import detect_family
from .families import FAMILIES, PrmFamily, get_family
from .text import TextVerifier

__all__ = ["FAMILIES", "PrmFamily", "TextVerifier", "detect_family", "get_family"]
