"""PRM families as data, their detection, and the text they read; `session` and `generative` run them."""

from .detect import detect_family
from .families import FAMILIES, GENERATIVE, get_family
from .family import PrmFamily
from .genprm import GenPrm
from .text import Extension, PrmPath, TextVerifier
from .thinkprm import ThinkPrm

__all__ = [
    "FAMILIES", "GENERATIVE", "Extension", "GenPrm", "PrmFamily", "PrmPath", "TextVerifier", "ThinkPrm",
    "detect_family", "get_family",
]  # fmt: skip
