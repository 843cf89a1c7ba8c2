"""Scoring of steps: the heads alone against logits at the kept rows, and a whole PRM's step against transformers."""

from __future__ import annotations

import gc

import torch
from gpu_measure import DEVICE, DTYPE, GPU, attempt, copies_for, measure, random_config

from ttskernels.kv import HeadShape, PagePool, plan_from_parents
from ttskernels.models.device import device_machine
from ttskernels.models.device_decoder import DeviceDecoder
from ttskernels.ops.step_score import step_score
from ttskernels.ops.token_logprob import token_logprob
from ttskernels.roofline import SHAPES, Shape

TINY_SHAPE = Shape("tiny", 1, 4, 2, 64, 64, 96, 131)


def cases(tiny: bool) -> dict:
    # (tokens, scored rows, width, vocabulary, inner width of the head)
    heads = [(20, 4, 64, 131, 0), (20, 4, 64, 0, 48)] if tiny else [
        (8192, 192, 4096, 128256, 0), (8192, 192, 3584, 0, 3584), (8192, 16, 3584, 0, 3584), (49152, 1024, 4096, 128256, 0),
        (8192, 192, 1536, 151936, 0),
    ]  # fmt: skip
    # (shape, branches, prompt, tokens of earlier steps, tokens of the new step)
    models = [(TINY_SHAPE, 3, 17, 8, 5)] if tiny else [
        (SHAPES["qwen2.5-1.5b"], 64, 512, 512, 64), (SHAPES["qwen2.5-1.5b"], 16, 512, 512, 64),
        (SHAPES["qwen2.5-0.5b"], 64, 512, 512, 64), (SHAPES["llama-3.1-8b"], 64, 512, 512, 64),
    ]  # fmt: skip
    made = {f"{s.name}: step of {new} tokens, {n} branches behind {p} + {old}": lambda a=(s, n, p, old, new): model_case(*a)
            for s, n, p, old, new in models}  # fmt: skip
    return made | {f"head alone: {t} tokens, {n} scored, {d} wide, " + (f"inner {i}" if i else f"vocabulary {v}"):
                   lambda a=(t, n, d, v, i): head_case(*a) for t, n, d, v, i in heads}  # fmt: skip


def head_case(tokens: int, n: int, dim: int, vocab: int, inner: int) -> dict:
    read, held = ((rows * dim + inner * dim) * DTYPE.itemsize for rows in (n, tokens))
    copies = copies_for(read, held)
    hidden = torch.randn(copies, tokens, dim, device=DEVICE, dtype=DTYPE)
    rows = torch.arange(n, dtype=torch.int32, device=DEVICE) * (tokens // n)
    norm, mix = torch.ones(dim, device=DEVICE, dtype=DTYPE), torch.tensor([0.0, 1.0], device=DEVICE)
    weight = torch.randn(2, inner or dim, device=DEVICE, dtype=DTYPE) * (inner or dim) ** -0.5
    first = torch.randn(copies, inner, dim, device=DEVICE, dtype=DTYPE).mul_(dim**-0.5) if inner else [None] * copies

    def score(i):
        return step_score(hidden[i], rows, weight, inner_weight=first[i], norm_weight=norm, mix=mix, impl="triton")

    row, picked = {"step_score": measure(score, copies)}, rows.long()

    def normed(i):
        return torch.nn.functional.rms_norm(hidden[i][picked], (dim,), norm, 1e-6)

    if inner:
        expected = torch.softmax((normed(0) @ first[0].T).relu() @ weight.T, -1)[:, 1].float()
        row["torch"] = measure(lambda i: torch.softmax((normed(i) @ first[i].T).relu() @ weight.T, -1)[:, 1], copies)
    else:
        lm_head = torch.randn(vocab, dim, device=DEVICE, dtype=DTYPE) * dim**-0.5
        lm_head[:2] = weight
        expected = torch.softmax((normed(0) @ lm_head.T)[:, :2].float(), -1)[:, 1]
        row["logits_to_keep"] = measure(lambda i: torch.softmax((normed(i) @ lm_head.T)[:, :2].float(), -1), copies)
        ids = torch.randint(vocab, (n,), dtype=torch.int32, device=DEVICE)
        ours = token_logprob(hidden[0], rows, lm_head, ids, norm_weight=norm, impl="triton")
        theirs = torch.log_softmax((normed(0) @ lm_head.T).float(), -1).gather(1, ids.long()[:, None])[:, 0]
        row["token_logprob"] = measure(
            lambda i: token_logprob(hidden[i], rows, lm_head, ids, norm_weight=norm, impl="triton"), copies
        )
        row["torch_log_softmax"] = measure(
            lambda i: torch.log_softmax((normed(i) @ lm_head.T).float(), -1).gather(1, ids.long()[:, None]), copies
        )
        row["logprob_difference"] = (ours - theirs).abs().max().item()
    row["score_difference"] = (score(0) - expected).abs().max().item()
    if max(row["score_difference"], row.get("logprob_difference", 0)) > 0.05:
        row["failed"] = "ours and torch differ"
    return row


def model_case(shape: Shape, branches: int, prompt: int, old: int, new: int) -> dict:
    """Scores of one new step of every branch: ours reads the new tokens alone, over a forest that shares the prompt.

    Calls are eager, as the engine's are: they upload ids. One copy of everything: a call reads all weights, of which the
    smallest model has more than four times a second-level cache, so it never finds them there."""
    row = our_scores(shape, branches, prompt, old, new)
    gc.collect()  # each side's peak is to be its own
    if GPU:
        torch.cuda.empty_cache()
    config = dict(hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
                  num_attention_heads=shape.q_heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
                  vocab_size=shape.vocab, tie_word_embeddings=True)  # fmt: skip
    return row | theirs(config, HeadShape(shape.q_heads, shape.kv_heads, shape.head_dim, shape.head_dim, DTYPE.itemsize),
                        branches, prompt + old, new)  # fmt: skip


def our_scores(shape: Shape, branches: int, prompt: int, old: int, new: int) -> dict:
    decoder, row = random_decoder(shape), {}
    heads, page = decoder.config.heads, 16
    parent = [-1, *([0] * branches), *range(1, branches + 1)]
    length = [prompt] + [old] * branches + [new] * branches
    indptr = [0]
    for tokens in length:
        indptr.append(indptr[-1] - -tokens // page)
    leaves = range(branches + 1, 2 * branches + 1)
    row_node = [leaf for leaf in leaves for _ in range(new)]
    row_pos = [prompt + old + i for _ in leaves for i in range(new)]
    machine = device_machine(DEVICE, heads)
    plan = plan_from_parents(parent, length, indptr, range(indptr[-1]), row_node, row_pos, heads, machine=machine,
                             cached=[prompt] + [old] * branches + [0] * branches)  # fmt: skip
    ends = torch.arange(new - 1, branches * new, new, dtype=torch.int32)
    out_plan = plan.of_rows(ends.tolist())
    pool = PagePool(shape.layers, shape.kv_heads, shape.head_dim, indptr[-1], DTYPE, device=DEVICE, strided=True)
    pool.k.normal_(), pool.v.normal_()
    ids, mix = torch.randint(shape.vocab, (branches * new,), dtype=torch.int32), torch.tensor([0.0, 1.0], device=DEVICE)
    head = torch.randn(2, shape.hidden, device=DEVICE, dtype=DTYPE) * shape.hidden**-0.5
    every = torch.arange(branches, dtype=torch.int32, device=DEVICE)

    def ours(_):
        hidden = decoder.forward(ids, plan, pool, out_plan, ends, "hidden")
        return step_score(hidden, every, head, norm_weight=decoder.norm, mix=mix, impl="triton")

    if GPU:
        torch.cuda.reset_peak_memory_stats()
    scores = ours(0)
    if not (bool(scores.isfinite().all()) and bool((scores >= 0).all() and (scores <= 1).all())):
        row["failed"] = "scores are not probabilities"
    row["ours"] = measure(ours, graph=False)
    if GPU:
        row["ours_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def theirs(config: dict, heads: HeadShape, branches: int, old: int, new: int) -> dict:
    """transformers: everything again with `logits_to_keep`, and new tokens over a cache that is expanded by hand."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(**config)).to(DTYPE).eval()
    ids = torch.randint(config["vocab_size"], (branches, old + new), device=DEVICE)
    row = {}

    @torch.no_grad()
    def again(_):
        return torch.softmax(model(ids, logits_to_keep=1, use_cache=False).logits[:, -1, :2].float(), -1)

    if GPU:
        torch.cuda.reset_peak_memory_stats()
    row["logits_to_keep"] = attempt(lambda: measure(again, graph=False))
    if GPU:
        row["logits_to_keep_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    cache = DynamicCache()
    for layer in range(config["num_hidden_layers"]):
        shape = (branches, heads.kv_heads, old, heads.head_dim)
        cache.update(*(torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(2)), layer)

    @torch.no_grad()
    def appended(_):
        logits = model(ids[:, old:], past_key_values=cache, logits_to_keep=1, use_cache=True).logits
        cache.crop(-new)
        return torch.softmax(logits[:, -1, :2].float(), -1)

    row["cache_by_hand"] = attempt(lambda: measure(appended, graph=False))
    return row


def random_decoder(shape: Shape) -> DeviceDecoder:
    """A decoder of this shape with random weights, as the engine runs a verifier."""
    c = random_config(shape, tied=False)
    queries, keys = c.q_heads * c.head_dim, c.kv_heads * c.head_dim
    sizes = {"self_attn.q_proj": (queries, c.hidden), "self_attn.k_proj": (keys, c.hidden),
             "self_attn.v_proj": (keys, c.hidden), "self_attn.o_proj": (c.hidden, queries),
             "mlp.gate_proj": (c.intermediate, c.hidden), "mlp.up_proj": (c.intermediate, c.hidden),
             "mlp.down_proj": (c.hidden, c.intermediate)}  # fmt: skip
    weights = {"model.embed_tokens.weight": (c.vocab, c.hidden)}
    weights |= {f"model.layers.{i}.{n}.weight": s for i in range(c.layers) for n, s in sizes.items()}
    made = {n: torch.randn(s, device=DEVICE, dtype=DTYPE).mul_(s[1] ** -0.5) for n, s in weights.items()}
    norms = [f"model.layers.{i}.{n}.weight" for i in range(c.layers) for n in ("input_layernorm", "post_attention_layernorm")]
    made |= {n: torch.ones(c.hidden, device=DEVICE, dtype=DTYPE) for n in [*norms, "model.norm.weight"]}
    return DeviceDecoder(c, made, False, DEVICE)
