"""PRM families as data, their detection, and the text they read; `session` runs them, and needs torch."""

from .detect import detect_family
from .families import FAMILIES, get_family
from .family import PrmFamily
from .text import Extension, PrmPath, TextVerifier

__all__ = ["FAMILIES", "Extension", "PrmFamily", "PrmPath", "TextVerifier", "detect_family", "get_family"]
