"""Small policy and verifier that ship with the package, and the arithmetic task they were trained on."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"
SIZES = ("base",)


def policy_path(size: str = "base") -> Path:
    """Hugging Face folder of the policy, a `LlamaForCausalLM`."""
    return _model_folder("policy", size)


def verifier_path(size: str = "base") -> Path:
    """Hugging Face folder of the verifier, a `LlamaForTokenClassification`; label 1 means good."""
    return _model_folder("verifier", size)


def _model_folder(role: str, size: str) -> Path:
    if size not in SIZES:
        raise ValueError(f"size must be one of {SIZES}, got {size!r}")
    return MODELS / f"{role}-{size}"
