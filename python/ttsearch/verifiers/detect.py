"""Which PRM family a checkpoint folder holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ttskernels.models.layouts import refuse
from ttskernels.models.weights import read_weights, weight_files

from .families import FAMILIES, GENERATIVE, Family, get_family
from .family import PrmFamily

MARKER_FILE = "ttsk_prm.json"
TOKENIZER_FILES = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "tokenizer.json")


def detect_family(folder: str | Path, family: str | Path | Family | None = None, source: str | Path = "") -> Family:
    """The family of a checkpoint: `family` (see `get_family`), else what its folder says.

    In this order: its `ttsk_prm.json`, which is `{"family": name}` with, if need be, single fields of it, as in
    `{"family": "trl", "suffix": "\\n\\n"}`; its well-known name (of the folder, or of `source`, the hub id or path it was
    loaded by); the architecture, weight names and added tokens, where they say enough.

    Raises:
        ValueError: a PRM known not to be supported; nothing says what it is, and the message lists the families.
    """
    folder = Path(folder)
    if family is not None:
        return get_family(family)
    if (folder / MARKER_FILE).exists():
        return get_family(folder / MARKER_FILE)
    config = {}
    if (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    refuse(str(source), folder, config)
    names = well_known_names(folder, str(source))
    for written in GENERATIVE.values():
        if any(fnmatch(name, pattern) for name in names for pattern in written.known_as):
            return written
    signs = Signs.read(folder, config)
    fitting = [f for f in FAMILIES.values() if signs.fit(f)]
    named = [f for f in fitting if any(fnmatch(name, pattern) for name in names for pattern in f.known_as)]
    sure = named or [f for f in fitting if not f.by_name_only]
    most = max((signs.seen(f) for f in sure), default=0)
    best = [f for f in sure if signs.seen(f) == most]
    if len(best) == 1:
        return best[0]
    labels = f" with {signs.labels} labels" if signs.labels else ""
    raise ValueError(
        f"cannot tell the PRM family of {folder.name} ({signs.architecture or 'no architecture'}{labels}); pass --prm-family, "
        f"one of {', '.join(f.name for f in best or fitting or FAMILIES.values())}, or a file that describes one"
    )


def well_known_names(folder: Path, source: str) -> list[str]:
    """Names that may be a hub's: of the folder, of its hub cache entry (models--owner--name/snapshots/..), of the source.

    Each between slashes, so that a pattern can ask for a word of its own, as in "*[/_-]er-prm[/_-]*".
    """
    cached = [part for part in folder.parts if part.startswith("models--")]
    given = Path(source).name if Path(source).exists() else source
    return [f"/{name.replace('--', '/').lower()}/" for name in (folder.name, *cached, given) if name]


@dataclass(frozen=True)
class Signs:
    """What a checkpoint's files say without reading its weights."""

    architecture: str
    labels: int | None
    weights: frozenset[str]
    tokenizer: str  # contents of the tokenizer's files; empty if they are elsewhere

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any]) -> Signs:
        if (folder / "adapter_config.json").exists():
            return cls("AdapterForCausalLM", None, frozenset(), "")
        try:
            weights = frozenset(read_weights(weight_files(folder)))
        except FileNotFoundError as error:
            raise ValueError(f"verifier must be a folder with a checkpoint: {error}") from error
        architecture = (config.get("architectures") or [""])[0]
        labels = None
        if architecture.endswith("ForTokenClassification"):
            labels = len(config.get("id2label") or {0: "", 1: ""})
        files = [folder / name for name in TOKENIZER_FILES]
        text = "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
        return cls(architecture, labels, weights, text)

    def fit(self, family: PrmFamily) -> bool:
        return (
            any(fnmatch(self.architecture, pattern) for pattern in family.architectures)
            and (family.weight is None or family.weight in self.weights)
            and (family.labels is None or self.labels is None or family.labels == self.labels)
            and (family.token is None or not self.tokenizer or family.token in self.tokenizer)
        )

    def seen(self, family: PrmFamily) -> int:
        """How many signs of a fitting family are there: [PRM] and a value head are more than a value head."""
        token = family.token is not None and family.token in self.tokenizer
        return (family.weight is not None) + (family.labels is not None) + token

