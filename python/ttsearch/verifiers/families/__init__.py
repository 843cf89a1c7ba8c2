"""The registry of PRM families: one file of data each. docs/verifiers.md shows how to add one."""

from __future__ import annotations

import json
import runpy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..family import PrmFamily
from ..genprm import GenPrm
from ..thinkprm import ThinkPrm
from ..written import GenerativeFamily
from . import (
    er_prm,
    implicit,
    judge,
    llemma,
    math_psa,
    math_shepherd,
    pqm,
    qwen,
    reasoneval,
    rlhflow,
    skywork,
    trl,
    versaprm,
)

MODULES = (
    math_shepherd, rlhflow, skywork, qwen, math_psa, er_prm, versaprm, pqm, trl, llemma, reasoneval, implicit, judge,
)  # fmt: skip
FAMILIES: dict[str, PrmFamily] = {family.name: family for module in MODULES for family in module.FAMILIES}

GENERATIVE: dict[str, GenerativeFamily] = {family.name: family for family in (ThinkPrm(), GenPrm())}
Family = PrmFamily | GenerativeFamily


def get_family(name: str | Path | Family, **overrides: Any) -> Family:
    """A family by name or from a file, with single fields replaced.

    Args:
        name: one of `FAMILIES` or `GENERATIVE`; or a .json file with the fields of a `PrmFamily` (or `{"family": name}` and
            the fields that differ); or a .py file that sets FAMILY to a family; or a family as it is.
    Raises:
        ValueError: unknown name, unknown field, a field that does not fit; the message says which.
    """
    if isinstance(name, Family):
        return change(name, overrides)
    if not isinstance(name, str | Path):
        raise ValueError(f"a PRM family must be a name, a file or a PrmFamily, got {name!r}")
    if Path(name).suffix in (".json", ".py"):
        return change(read_family(Path(name)), overrides)
    known = FAMILIES | GENERATIVE
    if name not in known:
        raise ValueError(
            f"PRM family must be one of {', '.join(known)}, or a .json or .py file that describes one, got {str(name)!r}"
        )
    return change(known[str(name)], overrides)


def change(family: Family | None, values: dict[str, Any], where: str = "") -> Family:
    """`family` with other values, or a new one of them alone."""
    known = [f.name for f in fields(family or PrmFamily)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{where}fields of a PRM family are {', '.join(known)}, got {unknown}")
    return replace(family, **values) if family else PrmFamily(**values)


def read_family(file: Path, starts: tuple[Path, ...] = ()) -> Family:
    """The family that a .json or .py file describes. `starts`: files that start from it."""
    if not file.is_file():
        raise ValueError(f"PRM family file {file} does not exist")
    if file.resolve() in starts:
        raise ValueError(f'PRM family file {file} starts from itself; its "family" must be another one')
    if file.suffix == ".py":
        family = runpy.run_path(str(file)).get("FAMILY")
        if not isinstance(family, Family):
            raise ValueError(f"{file.name} must set FAMILY to a PrmFamily, got {family!r}")
        return family
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} must be JSON with the fields of a PRM family: {error}") from error
    if not isinstance(values, dict) or not {"family", "name"} & set(values):
        raise ValueError(f'{file.name} must be an object with a "family" to start from or a "name" of its own, got {values}')
    if "family" not in values:
        return change(None, values, f"{file.name}: ")
    base = values.pop("family")
    if isinstance(base, str) and Path(base).suffix in (".json", ".py"):  # beside this one
        base = read_family(file.parent / base, (*starts, file.resolve()))
    return change(get_family(base), values, f"{file.name}: ")

