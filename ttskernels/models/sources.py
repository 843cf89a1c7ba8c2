"""Where a checkpoint comes from: a folder, a hub id or a GGUF file; the result is always a folder of weights."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

CONFIGS = ["config.json", "generation_config.json", "adapter_config.json"]
HUB_FILES = [*CONFIGS, "model.safetensors.index.json", "model*.safetensors", "adapter_model*", "reward_head.pt"]
HUB_FILES += ["ttsk_prm.json"]  # which text a verifier reads, for ttsearch
BIN_FILES = ["pytorch_model.bin.index.json", "pytorch_model*.bin"]  # asked for only where there is no safetensors


def resolve(source: str | os.PathLike, dtype: torch.dtype) -> Path:
    """Folder with the weights of `source`; downloads or converts when it has to.

    Raises:
        FileNotFoundError: nothing usable at `source`; the message lists what was looked for.
        ConnectionError: a hub id whose files are neither cached nor reachable.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(
                f"path must be a folder, a hub id or a .gguf file, got the file {path}; pass its folder"
            )
        return _convert(path, dtype)
    if path.is_dir():
        return _resolve_folder(path, dtype)
    if _is_hub_id(source):
        return _download_weights(str(source))
    raise FileNotFoundError(
        f"{path} does not exist; pass a checkpoint folder, a .gguf file or a hub id 'owner/name'"
    )


def resolve_config(source: str | os.PathLike) -> Path:
    """Folder with the config.json of `source`, whose weights are not needed (it is the base of a checkpoint without).

    Raises:
        FileNotFoundError, ConnectionError: no config.json there.
    """
    path = Path(source).expanduser()
    folder = path if path.is_dir() or not _is_hub_id(source) else _download(str(source), CONFIGS)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"base must hold a config.json, got {folder} without; pass the base model's folder")
    return folder


def _is_hub_id(source: str | os.PathLike) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None and not str(source).startswith(".")


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(
        (folder / name).is_file() for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
    )


def _resolve_folder(path: Path, dtype: torch.dtype) -> Path:
    if _has_weights(path):
        return path
    gguf = sorted(path.glob("*.gguf"))
    if len(gguf) > 1:
        raise ValueError(
            f"{path} holds {len(gguf)} .gguf files ({', '.join(f.name for f in gguf)}); pass one of them"
        )
    if gguf:
        return _convert(gguf[0], dtype)
    raise FileNotFoundError(
        f"{path} holds no checkpoint: expected config.json with *.safetensors or pytorch_model.bin, an adapter, "
        "or one .gguf file"
    )


def _convert(path: Path, dtype: torch.dtype) -> Path:
    from ttskernels.models.gguf import converted_folder

    return converted_folder(path, dtype)


def _download_weights(repo: str) -> Path:
    folder = _download(repo, HUB_FILES)
    if not _has_weights(folder):
        folder = _download(repo, HUB_FILES + BIN_FILES)
    if not _has_weights(folder):
        raise FileNotFoundError(
            f"{repo} holds no model*.safetensors, pytorch_model*.bin or adapter_model.*; "
            "download it and pass the folder with the weights, or the .gguf file"
        )
    return folder


def _download(repo: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo} is neither a folder here nor a repository on the hub (private? run `hf auth login`)"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConnectionError(
            f"{repo} is not a folder here, is not in the hub cache, and the hub cannot be reached "
            f"({type(error).__name__}); download it on a connected machine and pass the folder"
        ) from error
