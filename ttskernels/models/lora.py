"""LoRA adapters (PEFT folders, such as openr's Math-psa), merged into their base model when it is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ttskernels.models.weights import ADAPTER_FILES, read_json, read_weights, some

CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
# adapter_config.json entries that change what an adapter computes -> the values with which it is plain LoRA
PLAIN: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # others change the base, too (PiSSA, OLoRA, ...)
    "use_qalora": (False,),
    "modules_to_save": (),
    "rank_pattern": (),
    "alpha_pattern": (),
    "layer_replication": (),
    "layers_pattern": (),
    "target_parameters": (),
    "trainable_token_indices": (),
    "exclude_modules": (),
    "alora_invocation_tokens": (),
    "arrow_config": (),
}


@dataclass(frozen=True)
class Adapter:
    """`delta = scaling * B @ A` for the weights of some modules of a base model."""

    folder: Path
    base: str | None  # folder or hub id of the base model, as the adapter's authors had it
    rank: int
    scaling: float
    targets: str | tuple[str, ...]  # the ends of module names, or one pattern of whole names
    layers: tuple[int, ...] | None  # None: all
    revision: str | None = None  # of the base model on the hub, if it is not the main one

    def merge(self, weights: dict[str, Tensor]) -> None:
        """Add the adapter to its base model's `weights`, in float32; the sums stay float32 for the caller to round.

        Raises:
            ValueError: adapter weights missing, left over or of the wrong shape; the message names them.
        """
        adapter = read_weights([next(f for n in ADAPTER_FILES if (f := self.folder / n).is_file())])
        modules = [m for name in weights if (m := name.removesuffix(".weight")) != name and self.changes(m)]
        pairs = {m: [f"{PREFIX}{m}.lora_{side}.weight" for side in "AB"] for m in modules}
        expected = [name for pair in pairs.values() for name in pair]
        if not expected:
            raise ValueError(
                f"{self.folder}: target_modules {self.targets} match no weight of the base model; "
                "the adapter is of another architecture"
            )
        if missing := sorted(set(expected) - adapter.keys()):
            raise ValueError(f"{self.folder} lacks {some(missing)}, which its {CONFIG_FILE} asks for")
        if extra := sorted(adapter.keys() - set(expected)):
            raise ValueError(
                f"{self.folder} holds {some(extra)}, which target_modules {self.targets} do not name; "
                "the adapter's files do not belong together, or its base model is another one"
            )
        for module, names in pairs.items():
            base = weights[f"{module}.weight"]
            a, b = (adapter[name] for name in names)
            wanted = ((self.rank, base.shape[1]), (base.shape[0], self.rank))
            if (tuple(a.shape), tuple(b.shape)) != wanted:
                raise ValueError(
                    f"{self.folder}: {names[0]} and {names[1]} must have shapes {wanted[0]} and {wanted[1]} for this "
                    f"base model and r = {self.rank}, got {tuple(a.shape)} and {tuple(b.shape)}"
                )
            weights[f"{module}.weight"] = base.float() + self.scaling * (b.float() @ a.float())

    def changes(self, module: str) -> bool:
        """Whether the adapter has a delta for this module of the base model."""
        layer = re.search(r"\.layers\.(\d+)\.", module)
        if self.layers is not None and (layer is None or int(layer[1]) not in self.layers):
            return False
        if self.targets == "all-linear":
            return module.endswith("_proj")
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, module) is not None
        return any(module == target or module.endswith(f".{target}") for target in self.targets)


def read_adapter(folder: Path) -> Adapter | None:
    """The adapter in `folder`; None if it holds none.

    Raises:
        ValueError: something other than plain LoRA; the message names the entry.
    """
    if not (folder / CONFIG_FILE).is_file():
        return None
    if not any((folder / name).is_file() for name in ADAPTER_FILES):
        raise FileNotFoundError(f"{folder} holds {CONFIG_FILE} but neither {' nor '.join(ADAPTER_FILES)}")
    raw = read_json(folder / CONFIG_FILE)
    _refuse_unsupported(folder, raw)
    rank, alpha, targets = raw["r"], raw["lora_alpha"], raw["target_modules"]
    layers = raw.get("layers_to_transform")
    return Adapter(
        folder,
        raw.get("base_model_name_or_path") or None,
        rank,
        alpha / (rank**0.5 if raw.get("use_rslora") else rank),
        targets if isinstance(targets, str) else tuple(targets),
        tuple(_as_list(layers)) if layers is not None else None,
        raw.get("revision") if raw.get("revision") != "main" else None,
    )


def _refuse_unsupported(folder: Path, raw: Mapping[str, Any]) -> None:
    if lacking := [entry for entry in ("peft_type", "r", "lora_alpha", "target_modules") if not raw.get(entry)]:
        raise ValueError(f"{folder}/{CONFIG_FILE} must hold {', '.join(lacking)}")
    for entry, plain in PLAIN.items():
        value = raw.get(entry)
        if value in plain or value is None or value in ([], {}):
            continue
        wanted = f"be one of {plain}" if plain else "be empty"
        raise ValueError(
            f"{folder}/{CONFIG_FILE}: {entry} must {wanted}, got {value!r}; only plain LoRA is merged here: "
            "merge it with PEFT (merge_and_unload, save_pretrained) and load the result"
        )


def _as_list(value: int | Iterable[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)
