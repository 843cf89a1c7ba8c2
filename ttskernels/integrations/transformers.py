"""transformers, with this package's pages, forks and tree attention behind it.

    tree = TreeGenerate(model)                                # packs a Llama, Mistral or Qwen; others run by their own modules
    model.generate(**inputs, custom_generate=tree, num_return_sequences=64, do_sample=True)

`as_model` makes what `ttskernels.engine` runs out of a loaded model.
"""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch import Tensor

from ttskernels.engine.batcher import Engine
from ttskernels.engine.keys import root_key
from ttskernels.engine.work import Sampling, StepEnd
from ttskernels.models.device import check_device
from ttskernels.models.families import FAMILIES
from ttskernels.models.general_model import check_policy, eos_of, general_model
from ttskernels.models.loading import language_model
from ttskernels.models.model import Kv, Model, Weights, check_impl, make_decoder, with_kv

ENDED = -2  # of the stop automaton
WARPERS = {"TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"}
CRITERIA = {"MaxLengthCriteria", "EosTokenCriteria"}
IGNORED = {"position_ids", "cache_position", "use_cache", "logits_to_keep", "past_key_values"}  # ours are made anew


def as_model(hf, *, impl: str = "auto", weights: Weights = "auto", kv: Kv = "auto", general: bool | None = None) -> Model:
    """A loaded causal language model of transformers as a policy for `Engine`, on the device that it is on.

    Args:
        hf: what `AutoModelForCausalLM.from_pretrained` gives, in bf16, fp16 or fp32.
        impl, weights, kv: as in `load_model`.
        general: True: its own modules compute and only attention is ours; it is then switched to attention "ttsk_tree" and
            cannot run by itself until `set_attn_implementation` says otherwise. False: the fused decoder, with a copy of the
            weights. None: the fused decoder where it knows the family.
    Raises:
        ValueError: no language model, a family or feature that the decoder does not compute; with its own modules: a model
            that transformers' own attention gives other logits for (layers with a state, windows that are in the mask alone).
    """
    check_policy(hf)
    config = hf.config.get_text_config()
    if general is None:
        general = config.model_type not in FAMILIES
    if general:
        if weights not in ("auto", "float"):
            raise ValueError(f'weights must be "auto" or "float" for a model that runs by its own modules, got {weights!r}')
        return general_model(hf, impl, kv)
    where, impl = check_device(hf.device, impl)
    check_impl(impl)
    dtype = next(hf.parameters()).dtype
    tensors = {name: tensor.detach() for name, tensor in hf.state_dict().items()}
    checkpoint = language_model(config.to_dict(), tensors, dtype, eos_of(hf), Path(hf.name_or_path or "this model"))
    checkpoint = with_kv(checkpoint, kv, impl, where)
    return Model(checkpoint, *make_decoder(checkpoint, impl, lm_head=True, device=where, weights=weights))


class TreeGenerate:
    """`generate(..., custom_generate=TreeGenerate(model))`: each distinct prompt is computed once and its samples are
    branches that share its pages; prompts of other lengths are not padded.

    Greedy tokens are those of `generate`, but for ties within rounding. Samples come from the same distribution, not from the
    same random numbers; `torch.manual_seed` repeats them. The weights are those of the moment it was made: make another one
    after training.

    Args:
        hf: the model, as `as_model` takes it. kv_bytes: budget of KV pages. options: of `as_model`.
    Raises:
        ValueError: see `as_model`; when called, an option of `generate` that it does not have, weights changed since.
    """

    def __init__(self, hf, *, kv_bytes: int = 2 << 30, **options):
        self._hf, self._versions, self._attention = hf, _versions(hf), hf.config._attn_implementation
        self.model = as_model(hf, **options)
        self._engine = Engine(self.model, next_state=_end_table(self.model), kv_bytes=kv_bytes)

    def __call__(
        self, model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **kwargs
    ) -> Tensor:
        """What `generate` calls: `[rows, prompt + new]` ids on the device of `input_ids`."""
        keep = kwargs.pop("attention_mask", None)  # no argument of its own: `generate` would not get it then
        self._check(model, logits_processor, stopping_criteria, generation_config, kwargs)
        keep = torch.ones_like(input_ids) if keep is None else keep
        prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, keep, strict=True)]
        new = generation_config.max_length - input_ids.shape[1]
        made = self._run(prompts, new, _sampling(generation_config))
        pad = generation_config.pad_token_id
        pad = (self.model.config.eos_ids or (0,))[0] if pad is None else pad
        longest = max(map(len, made))
        rows = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in made], dtype=input_ids.dtype)
        return torch.cat([input_ids, rows.to(input_ids.device)], 1)

    def close(self) -> None:
        """Stop the engine, give back its memory, and let the model attend as it did before."""
        self._engine.shutdown()
        self._hf.set_attn_implementation(self._attention)

    def _run(self, prompts: list[list[int]], new: int, sampling: Sampling) -> list[list[int]]:
        """New ids of each prompt; equal ones are branches of one."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(tuple(prompt), []).append(row)
        made: list[StepEnd | BaseException | None] = [None] * len(prompts)
        left, done = len(prompts), threading.Event()

        def ended(row: int, end: StepEnd | BaseException) -> None:
            nonlocal left
            made[row], left = end, left - 1
            if not left:
                done.set()

        seed, sessions = int(torch.randint(2**62, ())), []
        try:
            for number, (prompt, rows) in enumerate(groups.items()):
                session = self._engine.open(list(prompt), max_new_tokens=new)
                sessions.append(session)
                self._engine.branch(
                    session, session.root, key=root_key(seed, str(number)), ordinals=range(len(rows)), path_key=(),
                    sampling=sampling, max_step_tokens=new, max_length=len(prompt) + new,
                    on_step=lambda ordinal, end, rows=rows: ended(rows[ordinal], end),
                )  # fmt: skip
            done.wait()
        finally:
            for session in sessions:
                self._engine.close(session)
        if failed := next((end for end in made if isinstance(end, BaseException)), None):
            raise failed
        return [list(end.ids) for end in made]

    def _check(self, model, processors, criteria, config, kwargs) -> None:
        if model is not self._hf:
            raise ValueError("model must be the one that this TreeGenerate was made for; make another one for this model")
        if _versions(model) != self._versions:
            raise ValueError("the model's weights have changed since this TreeGenerate was made; make another one")
        others = {type(part).__name__ for part in [*(processors or ()), *(criteria or ())]} - WARPERS - CRITERIA
        if others:
            raise ValueError(f"TreeGenerate has no {', '.join(sorted(others))}; leave those options of generate out")
        if config.num_beams > 1 or config.return_dict_in_generate:
            raise ValueError(
                "num_beams must be 1 and return_dict_in_generate off, as TreeGenerate samples or decodes greedily and returns "
                f"ids; got {config.num_beams} and {config.return_dict_in_generate}"
            )
        ends = config.eos_token_id
        if set(ends if isinstance(ends, list) else [ends]) - {None} != set(self.model.config.eos_ids):
            raise ValueError(f"eos_token_id must be the model's own {self.model.config.eos_ids}, got {ends}")
        cache = kwargs.get("past_key_values")
        others = sorted(name for name, value in kwargs.items() if name not in IGNORED and value not in (None, False))
        if others or cache is not None and cache.get_seq_length():
            raise ValueError(f"TreeGenerate has no {', '.join(others) or 'filled past_key_values'}; leave it out")


def _end_table(model: Model) -> Tensor:
    """A stop automaton of one state, which an end-of-text id leaves."""
    table = torch.zeros(1, model.config.vocab, dtype=torch.int32)
    table[0, list(model.config.eos_ids)] = ENDED
    return table


def _sampling(config) -> Sampling:
    if not config.do_sample:
        return Sampling(temperature=0.0)
    return Sampling(
        temperature=1.0 if config.temperature is None else config.temperature,
        top_k=config.top_k or 0,
        top_p=1.0 if config.top_p is None else config.top_p,
        min_p=config.min_p or 0.0,
    )


def _versions(hf) -> tuple[int, ...]:
    """How often each weight was written to in place, and where it is."""
    return tuple(n for weight in hf.parameters() for n in (weight._version, weight.data_ptr()))
