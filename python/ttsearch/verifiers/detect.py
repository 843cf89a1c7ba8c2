"""Which PRM family a checkpoint folder holds."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from .families import FAMILIES, PrmFamily, get_family

MARKER_FILE = "ttsk_prm.json"


def detect_family(folder: str | Path, family: str | None = None) -> PrmFamily:
    """The family named by `family`, by the folder's `ttsk_prm.json`, or seen in its config and weight names.

    `ttsk_prm.json` is `{"family": name}` with, if need be, single fields of it: `{"family": "trl", "suffix":
    "\\n\\n"}`.

    Raises:
        ValueError: nothing says what it is; the message lists the families.
    """
    folder = Path(folder)
    if family is not None:
        return get_family(family)
    marker = folder / MARKER_FILE
    if marker.exists():
        fields = json.loads(marker.read_text())
        if "family" not in fields:
            raise ValueError(f'{MARKER_FILE} must name a "family", got {fields}')
        return get_family(fields.pop("family"), **fields)
    config_file = folder / "config.json"
    if not config_file.exists():
        raise ValueError(f"verifier must be a folder with a config.json, got {folder}")
    config = json.loads(config_file.read_text())
    architecture = (config.get("architectures") or [""])[0]
    if architecture == "Qwen2ForProcessRewardModel":
        return FAMILIES["qwen-math-prm"]
    if architecture.endswith("ForTokenClassification"):
        labels = len(config.get("id2label") or {0: "", 1: ""})
        if labels != 2:
            raise ValueError(f"a token-classification PRM must have 2 labels, {folder.name} has {labels}")
        return FAMILIES["trl"]
    if "v_head.summary.weight" in _weight_names(folder):
        return FAMILIES["skywork"]
    raise ValueError(
        f"cannot tell the PRM family of {folder.name} (architecture {architecture or 'missing'}); "
        f"pass --prm-family, one of {', '.join(FAMILIES)}"
    )


def _weight_names(folder: Path) -> set[str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return set(json.loads(index.read_text())["weight_map"])
    weights = folder / "model.safetensors"
    if not weights.exists():
        return set()
    with weights.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return set(json.loads(file.read(length))) - {"__metadata__"}
