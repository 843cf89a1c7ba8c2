"""Best-of-N decoding: this engine beside transformers `generate`, interleaved in one run.

Why: N samples of one prompt are the cheapest search there is; everything else is measured against it.
Both sides get the same prompt ids, draw N samples of exactly T tokens at temperature 1 (no stop), and are timed over the
whole call, prefill included. transformers runs `generate(num_return_sequences=N)` in bf16 with its sdpa attention, and,
as the stronger form, one prefill whose cache is expanded N times before decoding. "ours, their modules" is what families
get that the fused decoder does not know: transformers' own layers over our pages and attention.

    python bench/best_of_n.py --policy SmolLM2-135M-Instruct.Q4_1.gguf --prompt 1024 --samples 64 --tokens 64

The last line is JSON: medians, every run, tokens, peak KV bytes, machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import threading
import time
from pathlib import Path

import torch

import ttskernels
from ttskernels.engine.batcher import Engine
from ttskernels.engine.work import Sampling
from ttskernels.integrations.transformers import as_model
from ttskernels.models import load_model
from ttskernels.models.sources import resolve


def ours(engine: Engine, prompt: list[int], samples: int, tokens: int, seed: int) -> dict:
    started = time.perf_counter()
    session = engine.open(prompt, None, max_new_tokens=tokens)
    left, done = [samples], threading.Event()

    def on_step(_, end):
        if isinstance(end, BaseException):
            raise end
        left[0] -= 1
        if left[0] == 0:
            done.set()

    engine.branch(
        session, session.root, key=seed, ordinals=range(samples), path_key=(), sampling=Sampling(1.0),
        max_step_tokens=tokens, max_length=len(prompt) + tokens, on_step=on_step,
    )  # fmt: skip
    done.wait()
    seconds = time.perf_counter() - started
    counters = session.counters
    assert counters.policy_decoded == samples * tokens
    engine.close(session)
    return {
        "seconds": seconds, "prefill_seconds": counters.prefill_seconds, "decode_seconds": counters.decode_seconds,
        "prefilled": counters.policy_prefilled, "peak_kv_bytes": counters.peak_kv_bytes,
    }  # fmt: skip


def generate(model, prompt: list[int], samples: int, tokens: int, seed: int) -> dict:
    torch.manual_seed(seed)
    ids = torch.tensor([prompt])
    started = time.perf_counter()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, num_return_sequences=samples,
        min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    assert out.shape == (samples, len(prompt) + tokens)
    return {"seconds": seconds, "prefilled": samples * len(prompt)}


@torch.inference_mode()
def generate_shared(model, prompt: list[int], samples: int, tokens: int, seed: int) -> dict:
    """One prefill, then `batch_repeat_interleave`: what a careful transformers user writes by hand."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    out = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    cache.batch_repeat_interleave(samples)
    logits = out.logits[:, -1].expand(samples, -1)
    for step in range(tokens):
        token = torch.multinomial(logits.float().softmax(-1), 1)
        if step + 1 < tokens:
            logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    return {"seconds": time.perf_counter() - started, "prefilled": len(prompt)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-generate", action="store_true", help="leave out plain generate, which prefills N times")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM

    policy = load_model(args.policy, torch.bfloat16)
    table = torch.zeros(1, policy.config.vocab, dtype=torch.int32)
    engine = Engine(policy, next_state=table, kv_bytes=4 << 30)
    reference = AutoModelForCausalLM.from_pretrained(resolve(args.policy, torch.bfloat16), dtype=torch.bfloat16)
    reference.generation_config.eos_token_id = None
    prompt = torch.randint(
        10, policy.config.vocab - 10, (args.prompt,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    sides = {"ours": lambda s: ours(engine, prompt, args.samples, args.tokens, s)}
    general = Engine(as_model(copy.deepcopy(reference), general=True), next_state=table, kv_bytes=4 << 30)
    sides["ours, their modules"] = lambda s: ours(general, prompt, args.samples, args.tokens, s)
    sides["transformers, one prefill"] = lambda s: generate_shared(reference, prompt, args.samples, args.tokens, s)
    if not args.skip_generate:
        sides["transformers generate"] = lambda s: generate(reference, prompt, args.samples, args.tokens, s)
    ours(engine, prompt, 2, 4, 0), ours(general, prompt, 2, 4, 0), generate_shared(reference, prompt, 2, 4, 0)  # warm all
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    for repeat in range(args.repeats):
        for name, side in sides.items():
            runs[name].append(side(repeat))
            print(f"{name:28} {runs[name][-1]['seconds']:8.2f} s", flush=True)
    medians = {name: statistics.median(r["seconds"] for r in each) for name, each in runs.items()}
    print(
        f"\n{args.samples} samples of {args.tokens} tokens after {args.prompt} prompt tokens, bf16, median of {args.repeats}"
    )
    for name, seconds in medians.items():
        rate = args.samples * args.tokens / seconds
        print(f"{name:28} {seconds:8.2f} s {rate:8.1f} tokens/s  {seconds / medians['ours']:6.2f} x ours")
    record = {
        "bench": "best_of_n", "args": {k: str(v) for k, v in vars(args).items()}, "median_seconds": medians, "runs": runs,
        "isa": ttskernels.isa_name(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(record, indent=1))
    print(json.dumps(record))
    engine.shutdown(), general.shutdown()


if __name__ == "__main__":
    main()
