"""transformers: `generate`, its continuous batching, one prefill expanded by hand; as reward model a DynamicCache with reorder.

`precision` is "bf16 generate", "bf16 batching" or "bf16 shared".
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

sys.path.insert(0, str(Path(__file__).parent))
from protocol import BAD, GOOD, serve, versions  # noqa: E402


class TransformersWorker:
    def load(self, model, precision, threads, context, sequences):
        torch.set_num_threads(threads)
        dtype, self.mode = precision.split()
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype={"bf16": torch.bfloat16}[dtype]).eval()
        self.model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
        pages = 2 * (-(-context // 256) + sequences) + 8  # left alone it takes most of the memory of the machine
        self.pages = ContinuousBatchingConfig(page_size=256, num_blocks=pages, max_batch_tokens=2048)
        return {"versions": versions("torch", "transformers"), "settings": {"mode": self.mode, "pages": pages}}

    def generate(self, prompts, samples, tokens, seed):
        torch.manual_seed(seed)
        started = time.perf_counter()
        ids = getattr(self, "_" + self.mode)(prompts, samples, tokens)
        return {"seconds": time.perf_counter() - started, "ids": ids}

    def _generate(self, prompts, samples, tokens):
        """`num_return_sequences` copies each prompt, so it is prefilled for every sample."""
        ids = torch.tensor(prompts)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            num_return_sequences=samples, min_new_tokens=tokens, max_new_tokens=tokens,
        )  # fmt: skip
        return out[:, ids.shape[1] :].tolist()

    def _batching(self, prompts, samples, tokens):
        """Children are forked behind one prefill and share whole pages of memory."""
        config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, eos_token_id=-1, pad_token_id=0,
            num_return_sequences=samples,
        )  # fmt: skip
        out = self.model.generate_batch(
            inputs=prompts, generation_config=config, continuous_batching_config=self.pages
        )
        ids = [list(result.generated_tokens) for result in out.values()]
        failed = [result.error for result in out.values() if result.error]
        if failed:
            raise RuntimeError(failed[0])
        return ids

    @torch.inference_mode()
    def _shared(self, prompts, samples, tokens):
        """One prefill, then `batch_repeat_interleave`: what a careful user writes by hand."""
        out = self.model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        cache, logits, columns = out.past_key_values, out.logits[:, -1].repeat_interleave(samples, 0), []
        cache.batch_repeat_interleave(samples)
        while True:
            columns.append(torch.multinomial(logits.float().softmax(-1), 1))
            if len(columns) == tokens:
                return torch.cat(columns, 1).tolist()
            logits = self.model(columns[-1], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def score_begin(self, prompt):
        self.prompt, self.cache = prompt, None

    @torch.inference_mode()
    def score_steps(self, parents, steps):
        started = time.perf_counter()
        if self.cache is None:
            self.cache = self.model(torch.tensor([self.prompt]), use_cache=True, logits_to_keep=1).past_key_values
            self.cache.batch_repeat_interleave(len(steps))
        elif list(parents) != list(range(self.cache.layers[0].keys.shape[0])):
            self.cache.reorder_cache(torch.tensor(parents))
        logits = self.model(torch.tensor(steps), past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        scores = self._read(logits)
        return {"seconds": time.perf_counter() - started, "scores": scores}

    @torch.inference_mode()
    def score_whole(self, paths):
        started = time.perf_counter()
        scores = self._read(self.model(torch.tensor(paths), use_cache=False, logits_to_keep=1).logits)
        return {"seconds": time.perf_counter() - started, "scores": scores}

    @staticmethod
    def _read(logits):
        return logits[:, -1, [GOOD, BAD]].float().softmax(-1)[:, 0].tolist()


if __name__ == "__main__":
    serve(TransformersWorker())
