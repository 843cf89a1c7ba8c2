"""What the engine refuses before work starts."""

from __future__ import annotations

from ttskernels.kv.pool import PAGE_SIZE


def check_prompt(name: str, ids: list[int] | None, side: str, model, length: int, times: int, kv_bytes: int) -> None:
    """A prompt must be shorter than the model allows, and one path of `times * length` tokens fit into the budget alone."""
    if ids is None:
        return
    check_model(name, model)
    check_ids(name, ids, model)
    limit = model.config.max_positions
    if len(ids) >= limit:
        raise ValueError(f"{name} has {len(ids)} tokens, the {side} allows {limit}; shorten it")
    need = _path_bytes(model, min(times * length, limit))
    if need > kv_bytes:
        raise ValueError(
            f"kv_bytes: one path of {length} tokens needs {need:,} bytes of KV, the budget is {kv_bytes:,}; "
            "raise kv_bytes or lower max_new_tokens"
        )


def check_model(name: str, model) -> None:
    if model is None:
        raise ValueError(f"{name}: the engine was made without the model that reads them; pass it to Engine(...)")


def check_ids(name: str, ids: list[int], model) -> None:
    if not ids:
        raise ValueError(f"{name} must hold at least one token id, got none")
    low, high = min(ids), max(ids)
    if low < 0 or high >= model.config.vocab:
        raise ValueError(
            f"{name} must hold ids in 0 .. {model.config.vocab - 1}, got {low if low < 0 else high}; wrong tokenizer?"
        )


def _path_bytes(model, tokens: int) -> int:
    """Pages of a path of `tokens` cut into steps: at worst one page a step is partly used."""
    return (-(-tokens // PAGE_SIZE) + 1) * PAGE_SIZE * model.kv_bytes_per_token
