"""Where a checkpoint comes from: a folder, a hub id or a GGUF file; the result is always a folder of safetensors."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

HUB_FILES = ["config.json", "generation_config.json", "model.safetensors.index.json", "model*.safetensors"]


def resolve(source: str | os.PathLike, dtype: torch.dtype) -> Path:
    """Folder with config.json and safetensors of `source`; downloads or converts when it has to.

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
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not str(source).startswith("."):
        return _download(str(source))
    raise FileNotFoundError(
        f"{path} does not exist; pass a checkpoint folder, a .gguf file or a hub id 'owner/name'"
    )


def _resolve_folder(path: Path, dtype: torch.dtype) -> Path:
    if any(path.glob("*.safetensors")):
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"{path} holds safetensors but no config.json; copy it from the original checkpoint"
            )
        return path
    gguf = sorted(path.glob("*.gguf"))
    if len(gguf) > 1:
        raise ValueError(
            f"{path} holds {len(gguf)} .gguf files ({', '.join(f.name for f in gguf)}); pass one of them"
        )
    if gguf:
        return _convert(gguf[0], dtype)
    if any(path.glob("*.bin")):
        raise FileNotFoundError(
            f"{path} holds .bin weights only; save it again with safetensors (save_pretrained does)"
        )
    raise FileNotFoundError(
        f"{path} holds no checkpoint: expected config.json and *.safetensors, or one .gguf file"
    )


def _convert(path: Path, dtype: torch.dtype) -> Path:
    from ttskernels.models.gguf import converted_folder

    return converted_folder(path, dtype)


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repo, allow_patterns=HUB_FILES))
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo} is neither a folder here nor a repository on the hub (private? run `hf auth login`)"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConnectionError(
            f"{repo} is not a folder here, is not in the hub cache, and the hub cannot be reached "
            f"({type(error).__name__}); download it on a connected machine and pass the folder"
        ) from error
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{repo} holds no config.json with model*.safetensors; download it and pass the folder or .gguf file"
        )
    return folder
