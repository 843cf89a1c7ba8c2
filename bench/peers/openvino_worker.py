"""OpenVINO GenAI: continuous batching with prefix caching, over an exported model (bf16 or int8 weights) or the Q4_1 .gguf.

bf16 sets INFERENCE_PRECISION_HINT; the other precisions leave every choice to the library.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai

sys.path.insert(0, str(Path(__file__).parent))
from protocol import serve, versions  # noqa: E402


class OpenvinoWorker:
    def load(self, model, precision, threads, context, sequences):
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.cache_size = 4  # GiB
        scheduler.max_num_seqs = max(sequences, 16)
        scheduler.max_num_batched_tokens = 2048
        options = {"INFERENCE_NUM_THREADS": threads}
        if precision == "bf16":
            options["INFERENCE_PRECISION_HINT"] = "bf16"
        self.pipe = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", options)
        return {"versions": versions("openvino", "openvino-genai"), "settings": {**options, "precision": precision}}

    def generate(self, prompts, samples, tokens, seed):
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.ignore_eos, config.rng_seed = True, seed
        config.num_return_sequences, config.do_sample = samples, True
        config.temperature, config.top_p, config.repetition_penalty = 1.0, 1.0, 1.0
        inputs = [ov.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        started = time.perf_counter()
        out = self.pipe.generate(inputs, [config] * len(prompts))
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "ids": [list(ids) for result in out for ids in result.m_generation_ids]}


if __name__ == "__main__":
    serve(OpenvinoWorker())
