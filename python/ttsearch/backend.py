"""Which engine runs the models. The local one is imported only when it is asked for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .protocols import Backend, Verifier


def load_backend(
    policy: str | Path | None = None,
    verifier: str | Path | None = None,
    *,
    prm_family: str | None = None,
    prm_reference: str | Path | None = None,
    prm_base: str | Path | None = None,
    prompt_style: str | None = None,
    kv_gib: float | None = None,
    **options: Any,
) -> Backend:
    """Load models on the local engine.

    Args:
        policy: checkpoint folder or hub id. None: the demo policy that ships with the package.
        verifier: the same. None: the demo verifier if the policy is the demo's, else none. "none": no verifier.
            "likelihood": steps score their own mean token likelihood, no second model.
        prm_family: what the verifier reads, or writes: one of `ttsearch.verifiers.FAMILIES` or `GENERATIVE`, or a .json
            or .py file that describes another. None: seen in the checkpoint.
        prm_reference: of an implicit PRM, the model that it was trained from.
        prm_base: of a verifier that is an adapter, or weights without a config.json (PQM), the model it was trained on.
        prompt_style: "plain", "qwen", "llama" or "r1". None: by the policy's chat template.
        kv_gib: memory for both KV forests. None: the engine decides.
        options: handed to the engine (`dtype`, `impl`, `device`, `weights`, `kv`, `speculate`, `keep_prompts`).
    """
    kv_bytes = gib_to_bytes(kv_gib)
    if policy is None:
        from .demo import policy_path, verifier_path

        policy = policy_path()
        verifier = verifier_path() if verifier is None else verifier
    if verifier == "none":
        verifier = None
    try:
        from .policies.local import LocalBackend
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the local engine is not here ({error}); pass backend=..., or reinstall ttskernels"
        ) from error
    return LocalBackend.load(
        policy, verifier, prm_family=prm_family, prm_reference=prm_reference, prm_base=prm_base,
        prompt_style=prompt_style, kv_bytes=kv_bytes, **options,
    )  # fmt: skip


def gib_to_bytes(kv_gib: float | None) -> int | None:
    if kv_gib is None:
        return None
    if not 0 < kv_gib < math.inf:
        raise ValueError(f"kv_gib must be a finite number > 0, got {kv_gib}")
    return int(kv_gib * 2**30)


def load_verifier(source: str | Path, family: Any = None, **options: Any) -> Verifier:
    """Load a process reward model by itself; see `ttsearch.verifiers.session.load_verifier` for the options."""
    from .verifiers.session import load_verifier as load

    return load(source, family, **options)
