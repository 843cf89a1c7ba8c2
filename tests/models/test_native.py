"""The C++ decoder's own promises: a row's bits depend on its path alone, a broken call raises and never crashes.

Agreement with transformers is in test_decoder.py, for every family.
"""

import ctypes
import dataclasses
import gc

import pytest
import torch
from tiny_models import write_tiny
from trees import Tree

from ttskernels import _dispatch
from ttskernels.models import load_checkpoint, load_model
from ttskernels.models.decoder import Forms, PythonDecoder
from ttskernels.models.model import forms_of
from ttskernels.models.native import NativeDecoder
from ttskernels.ops.sample import sample

VOCAB = 131
KV = ["float", "int16", "int8"]
IDS = [(7 * i * i + 3 * i + 5) % VOCAB for i in range(45)]


@pytest.fixture
def native(isa, tmp_path):
    def load(variant="qwen3", dtype=torch.bfloat16, kv="float", weights="auto"):
        write_tiny(tmp_path, variant)
        return load_model(tmp_path, dtype, "cpu", kv=kv, weights=weights)

    return load


def prefill(model, ids):
    tree = Tree(model)
    node = tree.forest.add(None, ids)
    return tree, node, tree.run([node])


def greedy(rows):
    return torch.tensor([[0.0, 0.0, 1.0, 0.0]] * rows)


@pytest.mark.parametrize("variant", ["llama_smollm2", "mistral_window", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "dtype, kv", [(torch.float32, "float"), (torch.bfloat16, "float"), (torch.bfloat16, "int16"), (torch.bfloat16, "int8")]
)
def test_prefill_in_pieces_is_the_same_bits(native, variant, dtype, kv):
    model = native(variant, dtype, kv)
    _, _, whole = prefill(model, IDS)
    for cut in (1, 16, 44):
        tree, node, first = prefill(model, IDS[:cut])
        tree.grow(node, IDS[cut:])
        assert torch.equal(torch.cat([first, tree.run([node])]), whole), f"cut at {cut}"


@pytest.mark.parametrize("variant", ["llama_smollm2", "llama"])  # tied, and a head of its own
def test_the_likeliest_logits_of_an_int8_model_are_refined(native, variant):
    """They are products of the head's own rows with the final norm's output; the others are not."""
    model = native(variant, torch.float32, weights="int8")
    _, _, logits = prefill(model, IDS)
    tree = Tree(model)
    hidden = tree.run([tree.forest.add(None, IDS)], output="hidden")
    normed = hidden * torch.rsqrt(hidden.square().mean(1, keepdim=True) + model.config.rms_eps) * model.norm
    off = (normed @ model.lm_head.T - logits).abs()
    top, ids = logits.topk(16, 1)
    likeliest = torch.zeros_like(off, dtype=torch.bool).scatter(1, ids[:, :8], top[:, :8] > top[:, :1] - 2.5)
    assert off[likeliest].max() <= 2e-5 * logits.abs().max()
    assert off[~likeliest].max() > 100 * off[likeliest].max()


def test_auto_is_fixed_point_where_bf16_products_are_not_fast(native, isa):
    auto = "int16" if isa in ("avx2", "avx512", "avx512_vnni") else "float"
    assert native(kv="auto").config.kv_form == auto
    assert native(dtype=torch.float32, kv="auto").config.kv_form == "float"
    assert forms_of("int8", "cpu", torch.bfloat16) == Forms("int8", "int16", auto)
    assert forms_of("int8", "cpu", torch.float32) == Forms("int8", "int16", "int16")
    assert forms_of("int16", "cpu", torch.bfloat16) == Forms("int16", "int16", "int16")


@pytest.mark.parametrize("kv, weights", [*((kv, "auto") for kv in KV), ("float", "int16"), ("float", "int8"), ("int8", "int8")])
def test_row_alone_equals_row_in_a_batch(native, kv, weights):
    model = native(kv=kv, weights=weights)
    alone = prefill(model, IDS)[2]
    tree = Tree(model)
    others = [tree.forest.add(None, [(i * j + 1) % VOCAB for j in range(n)]) for i, n in enumerate((3, 33, 18))]
    node = tree.forest.add(None, IDS)
    batch = tree.run([*others, node])
    assert torch.equal(batch[-len(IDS) :], alone)


@pytest.mark.parametrize("kv", KV)
def test_evicted_and_recomputed_is_the_same_bits(native, kv):
    model = native(kv=kv)
    tree, root, _ = prefill(model, IDS[:30])
    step, other = tree.forest.fork(root, 2)
    tree.grow(step, IDS[30:40])
    tree.grow(other, IDS[5:9])
    before = tree.run([step])
    for victims in ([step], [root], [root, step]):
        for node in victims:
            tree.forest.evict(node)
        tree.forest.reserve([other], 0)  # takes the freed pages, so the recomputed ones lie elsewhere
        tree.run([n for n in (root, step) if n.cached < len(n.ids)])
        tree.forest.evict(step)
        assert torch.equal(tree.run([step]), before), f"after evicting {victims}"


LAST_LAYER = {  # columns of q are no multiple of 64, with biases; sliding window; norms of q and k
    "qwen2": {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 240},
    "mistral_window": {},
    "qwen3": {},
}


@pytest.mark.parametrize("python, kv", [(False, "float"), (True, "float"), (False, "int8"), (True, "int16")])
@pytest.mark.parametrize("variant", LAST_LAYER)
def test_out_rows_are_rows_of_the_full_result(isa, tmp_path, variant, python, kv):
    """The last layer runs for the read rows alone: the bits of each, and the K, V of all rows, stay the same."""
    write_tiny(tmp_path, variant, **LAST_LAYER[variant])
    model = load_model(tmp_path, torch.bfloat16, "cpu", kv=kv)
    if python:
        model._decoder = PythonDecoder(model.config, load_checkpoint(tmp_path, torch.bfloat16).weights, "cpu")

    def run(out):
        tree = Tree(model)
        root = tree.forest.add(None, IDS)
        tree.run([root], out=None if out is None else [])
        leaves = tree.forest.fork(root, 2)
        for leaf, n in zip(leaves, (20, 3), strict=True):
            tree.grow(leaf, IDS[:n])
        steps = tree.run(leaves, out=out)
        tree.grow(leaves[0], IDS[30:33])
        return steps, tree.run(leaves[:1])

    (every, below), reads = run(None), [22, 3, 3, 19]
    some, below_some = run(reads)
    assert torch.equal(some, every[reads]) and torch.equal(below_some, below)
    assert torch.equal(run([22] * 30)[0], every[[22] * 30])  # more reads than rows


@pytest.mark.parametrize("kv", KV)
def test_thread_count_does_not_matter(native, kv):
    model, lib = native(kv=kv), _dispatch.library()
    threads, results = lib.ttsk_num_threads(), []
    try:
        for n in (1, 2, 3):
            lib.ttsk_set_num_threads(n)
            results.append(prefill(model, IDS)[2])
    finally:
        lib.ttsk_set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


class Loop:
    """Arguments of decode for leaves of one prompt, two automaton states that never end."""

    def __init__(self, model, leaves=2, iterations=6):
        self.model = model
        self.tree, node, logits = prefill(model, IDS[:20])
        self.nodes = self.tree.forest.fork(node, leaves)
        first = int(logits[-1].argmax())
        for leaf in self.nodes:
            self.tree.grow(leaf, [first])
            self.tree.forest.reserve([leaf], iterations)
        self.ids = torch.full((leaves,), first, dtype=torch.int32)
        self.keys = torch.arange(leaves) + 99
        self.params = greedy(leaves)
        self.next_state = torch.zeros(2, VOCAB, dtype=torch.int32)
        self.states = torch.zeros(leaves, dtype=torch.int32)
        self.tokens = torch.full((iterations, leaves), -7, dtype=torch.int32)
        self.logprobs = torch.zeros(iterations, leaves)
        self.plan = self.tree.plan([(leaf, 0, 1) for leaf in self.nodes])

    def run(self, decoder=None):
        return (decoder or self.model).decode(
            self.ids, self.plan, self.tree.pool, self.keys, self.params, self.next_state, self.states, self.tokens,
            self.logprobs,
        )  # fmt: skip


@pytest.mark.parametrize("kv", KV)
def test_decode_is_prefill_of_its_own_tokens(native, kv):
    loop = Loop(native(kv=kv))
    first = int(loop.ids[0])
    assert loop.run() == 6
    tree, node, _ = prefill(loop.model, IDS[:20])  # the same chain of nodes: prompt, then the leaf at once
    leaf = tree.forest.fork(node, 2)[0]
    tree.grow(leaf, [first, *loop.tokens[:-1, 0].tolist()])
    logits = tree.run([leaf])
    assert torch.equal(loop.tokens[:, 0], logits.argmax(-1).int())
    draws = torch.arange(6, dtype=torch.int32)
    assert torch.equal(loop.logprobs[:, 0], sample(logits, draws, torch.arange(6), draws, greedy(6))[1])


def test_seeded_rows_draw_the_same_alone(native):
    model = native()
    both, alone = Loop(model), Loop(model, leaves=1)
    for loop in (both, alone):
        loop.params = torch.tensor([[1.5, 0.0, 0.95, 0.01]] * len(loop.nodes))
        assert loop.run() == 6
    assert torch.equal(both.tokens[:, 0], alone.tokens[:, 0])
    assert torch.equal(both.logprobs[:, 0], alone.logprobs[:, 0])
    assert not torch.equal(both.tokens[:, 0], both.tokens[:, 1])  # another key, another path


def test_decode_stops_when_a_state_ends(native):
    model = native()
    full = Loop(model)
    full.run()
    loop = Loop(model)
    loop.next_state[:] = 1
    third = int(full.tokens[2, 0])
    end = full.tokens[:, 0].tolist().index(third)
    loop.next_state[:, third] = -2
    assert loop.run() == end + 1
    assert loop.states[0] == -2 and (loop.tokens[end + 1 :] == -7).all()
    assert torch.equal(loop.tokens[: end + 1], full.tokens[: end + 1])


def test_non_finite_logits_name_the_row(native, tmp_path):
    model = native()
    loop = Loop(model, leaves=3)
    weights = load_checkpoint(tmp_path, torch.bfloat16).weights
    embed = "model.embed_tokens.weight"
    unseen = min(set(range(VOCAB)) - {*IDS, *loop.ids.tolist()})
    damaged = weights | {embed: weights[embed].index_fill(0, torch.tensor([unseen]), torch.nan)}
    loop.ids[1] = unseen
    with pytest.raises(ValueError, match="logits of row 1 are not finite after 0 iterations"):
        loop.run(NativeDecoder(model.config, damaged, True))


def test_what_overflows_is_an_error_in_fixed_point_as_well(native, tmp_path):
    """V of a damaged layer is infinite, its scale NaN: so is all that attention reads."""
    model = native(kv="int8")
    weights = load_checkpoint(tmp_path, torch.bfloat16).weights
    name = "model.layers.0.self_attn.v_proj.weight"
    damaged = weights | {name: torch.full_like(weights[name], torch.inf)}
    with pytest.raises(ValueError, match="logits of row 0 are not finite after 0 iterations"):
        Loop(model).run(NativeDecoder(model.config, damaged, True))


def test_handles_are_freed(native):
    model = native()
    decoder = model._decoder
    handle = decoder._handle
    del model, decoder
    gc.collect()
    pool = torch.zeros(1)
    ids = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="is unknown or was freed"):
        torch.ops.ttskernels.decoder_forward(handle, pool, pool, ids, ids, ids, 0, 1)
    _dispatch.library().ttsk_decoder_free(ctypes.c_int64(handle))  # again: nothing happens


def test_broken_calls_raise(native):
    model = native("llama")
    forward, decode = torch.ops.ttskernels.decoder_forward, torch.ops.ttskernels.decoder_decode

    def args(loop):
        return [model._decoder._handle, loop.tree.pool.k, loop.tree.pool.v, loop.plan.buffer, loop.ids]

    def decode_args(loop):
        return [*args(loop), loop.keys, loop.params, loop.next_state, loop.states, loop.tokens, loop.logprobs]

    rows, hidden = torch.zeros(1, dtype=torch.int32), model.config.hidden
    loop = Loop(model)
    with pytest.raises(RuntimeError, match="width must be"):
        forward(*args(loop), rows, 0, hidden + 1)
    with pytest.raises(RuntimeError, match="handle 12345 is unknown"):
        forward(12345, *args(loop)[1:], rows, 0, hidden)
    for bad in (-1, VOCAB):
        with pytest.raises(RuntimeError, match=rf"ids\[0\] must lie in 0 .. {VOCAB - 1}"):
            forward(*args(loop)[:4], torch.full((2,), bad, dtype=torch.int32), rows, 0, hidden)
    with pytest.raises(RuntimeError, match=r"out_rows\[0\] must lie in 0 .. 1"):
        forward(*args(loop), rows + 2, 0, hidden)
    with pytest.raises(RuntimeError, match="out_rows must be all rows in order without an out_plan"):
        forward(*args(loop), rows, 0, hidden)
    with pytest.raises(RuntimeError, match="plan has 2 rows, the call has 1"):
        forward(*args(loop), rows, 0, hidden, loop.plan.buffer)
    with pytest.raises(RuntimeError, match="plan has magic"):
        forward(*args(loop)[:3], torch.zeros_like(loop.plan.buffer), loop.ids, rows, 0, hidden)
    with pytest.raises(RuntimeError, match="pools must"):
        forward(args(loop)[0], loop.tree.pool.k[:1], loop.tree.pool.v[:1], *args(loop)[3:], rows, 0, hidden)
    ints = torch.zeros(2, 64, 2, 16 * 64, dtype=torch.int8)  # without room for the scales
    with pytest.raises(RuntimeError, match="pools must be contiguous fixed-point pools of this model"):
        forward(args(loop)[0], ints, ints, *args(loop)[3:], rows, 0, hidden)
    loop.next_state[:] = 2
    with pytest.raises(RuntimeError, match="next_state leads to state 2, it has 2 states"):
        decode(*decode_args(loop))
    loop = Loop(model)
    loop.states[1] = 2
    with pytest.raises(RuntimeError, match=r"states\[1\] must lie in 0 .. 1"):
        decode(*decode_args(loop))
    loop = Loop(model)
    loop.params[1, 2] = 0
    with pytest.raises(RuntimeError, match=r"params\[1\]"):
        decode(*decode_args(loop))


@pytest.mark.parametrize("kv", KV)
def test_opcheck(native, kv):
    model = native("llama", kv=kv)
    loop = Loop(model)
    first = [model._decoder._handle, loop.tree.pool.k, loop.tree.pool.v, loop.plan.buffer, loop.ids]
    for rows, plan in (([0, 1], None), ([1], loop.plan.of_rows([1]).buffer)):
        rows = torch.tensor(rows, dtype=torch.int32)
        torch.library.opcheck(torch.ops.ttskernels.decoder_forward.default, (*first, rows, 1, VOCAB, plan))
    rest = [loop.keys, loop.params, loop.next_state, loop.states, loop.tokens, loop.logprobs]
    torch.library.opcheck(torch.ops.ttskernels.decoder_decode.default, (*first, *rest))


def test_misshapen_weights_raise(native, tmp_path):
    model = native("llama")
    c = model.config
    weights = load_checkpoint(tmp_path, torch.float32).weights
    config = dataclasses.replace(c, dtype=torch.float32)
    NativeDecoder(config, weights, True)
    name = "model.layers.0.self_attn.k_proj.weight"
    with pytest.raises((RuntimeError, ValueError), match="weight"):
        NativeDecoder(config, weights | {name: weights[name].T.contiguous()}, True)
    with pytest.raises((RuntimeError, ValueError), match="dtype"):
        NativeDecoder(config, weights | {name: weights[name].half()}, True)
