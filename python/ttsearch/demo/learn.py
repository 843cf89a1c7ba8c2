"""One optimiser loop for all stages: token loss and step-label loss over a shared trunk, with checkpoints."""

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn import functional as F

from .batches import IGNORED, Batch

SECONDS_BETWEEN_CHECKPOINTS = 60
UPDATES_BETWEEN_LOG_LINES = 50


def losses(model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token loss through the tied embedding, and label loss through the `score` head."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    spoken, labelled = batch.next_ids != IGNORED, batch.labels != IGNORED
    token_logits = hidden[spoken] @ model.model.embed_tokens.weight.T
    token_loss = F.cross_entropy(token_logits, batch.next_ids[spoken]) if spoken.any() else hidden.sum() * 0
    label_loss = F.cross_entropy(model.score(hidden[labelled]), batch.labels[labelled])
    return token_loss, label_loss


def make_optimizer(model, learning_rate: float) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


def save_atomically(state: dict, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def learn(
    name: str,
    model,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    *,
    updates: int,
    learning_rate: Callable[[int], float],
    label_weight: float,
    checkpoint: Path,
    stop: Callable[[int, float], bool] = lambda update, loss: False,
) -> None:
    """Run until `updates` or until `stop(update, token_loss)`; goes on from `checkpoint` where there is one.

    `batches.position`, where the iterator has one, travels with the checkpoint.
    """
    update, seconds, smooth = 0, 0.0, None
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        update, seconds, smooth, batches.position = (
            state[k] for k in ("update", "seconds", "smooth", "position")
        )
        print(f"{name}: resumed at update {update}", flush=True)

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "update": update}
        save_atomically(
            state | {"seconds": seconds, "smooth": smooth, "position": batches.position}, checkpoint
        )

    model.train()
    tokens, last_save = 0, time.monotonic()
    while update < updates:
        started = time.monotonic()
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update)
        token_loss, label_loss = losses(model, batch)
        (token_loss + label_weight * label_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update, tokens = update + 1, tokens + batch.ids.numel()
        now = (token_loss.item(), label_loss.item())
        smooth = (
            now if smooth is None else tuple(0.95 * a + 0.05 * b for a, b in zip(smooth, now, strict=True))
        )
        seconds += time.monotonic() - started
        if update % UPDATES_BETWEEN_LOG_LINES == 0:
            shown = f"token loss {smooth[0]:.4f}  label loss {smooth[1]:.4f}"
            print(f"{name}: update {update}  {seconds / 60:.1f} min  {shown}", flush=True)
        if stop(update, smooth[0]):
            break
        if time.monotonic() - last_save > SECONDS_BETWEEN_CHECKPOINTS:
            save()
            last_save = time.monotonic()
    save()


def warm_up(peak: float, warmup_updates: int) -> Callable[[int], float]:
    return lambda update: peak * min(1.0, (update + 1) / warmup_updates)


def cosine(peak: float, updates: int, warmup_updates: int = 1) -> Callable[[int], float]:
    def rate(update: int) -> float:
        rise = min(1.0, (update + 1) / warmup_updates)
        return peak * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, update / updates))))

    return rate
