"""decode against dense recomputation, its stopping rules, and what the model refuses."""

import pytest
import torch
from tiny_models import write_tiny
from transformers import AutoModelForCausalLM
from trees import Tree

from ttskernels import available
from ttskernels.errors import UnavailableError
from ttskernels.kv import ByteBudget
from ttskernels.models import load_checkpoint, load_model
from ttskernels.models.model import with_kv

VOCAB = 131


@pytest.fixture(params=["reference", "cpu"])
def impl(request):
    if reason := available(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def model(impl, tmp_path):
    write_tiny(tmp_path, "llama")
    return load_model(tmp_path, torch.float32, impl)


def leaves_of(model, slots, prompts=((3, 1, 4, 1, 5), (9, 2, 6))):
    """A tree with one leaf per prompt that holds the prompt's last id, and the ids of these rows."""
    tree = Tree(model)
    leaves = []
    for prompt in prompts:
        root = tree.forest.add(None, prompt[:-1])
        tree.run([root])
        leaf = tree.forest.add(root, prompt[-1:])
        tree.forest.reserve([leaf], slots)
        leaves.append(leaf)
    return tree, leaves, torch.tensor([p[-1] for p in prompts], dtype=torch.int32)


def decode(model, tree, leaves, ids, iterations=8, next_state=None, params=None):
    rows = len(leaves)
    plan = tree.plan([(leaf, len(leaf.ids) - 1, 1) for leaf in leaves])
    keys = torch.arange(rows, dtype=torch.int64)
    params = torch.tensor([[0.0, 0, 1, 0]]).repeat(rows, 1) if params is None else params
    next_state = torch.zeros(1, VOCAB, dtype=torch.int32) if next_state is None else next_state
    states = torch.zeros(rows, dtype=torch.int32)
    tokens = torch.full((iterations, rows), -7, dtype=torch.int32)
    logprobs = torch.zeros(iterations, rows)
    done = model.decode(ids, plan, tree.pool, keys, params, next_state, states, tokens, logprobs)
    return done, tokens, logprobs, states


def greedy(folder, prompt, n):
    """(tokens, log-probabilities) by dense recomputation."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids, logprobs = list(prompt), []
    for _ in range(n):
        with torch.no_grad():
            last = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(last.argmax()))
        logprobs.append(last.max())
    return ids[len(prompt) :], torch.stack(logprobs)


def test_greedy_equals_dense(model, tmp_path):
    tree, leaves, ids = leaves_of(model, slots=20)
    done, tokens, logprobs, _ = decode(model, tree, leaves, ids, iterations=18)
    assert done == 18
    for row, prompt in enumerate(((3, 1, 4, 1, 5), (9, 2, 6))):
        expected, expected_logprobs = greedy(tmp_path, prompt, 18)
        assert tokens[:, row].tolist() == expected
        torch.testing.assert_close(logprobs[:, row], expected_logprobs, atol=1e-4, rtol=1e-4)
    assert ids.tolist() == tokens[-1].tolist()


def test_sampling_depends_on_key_and_position_alone(model):
    params = torch.tensor([[1.0, 0, 1, 0]]).repeat(2, 1)
    tree, leaves, ids = leaves_of(model, slots=16)
    _, together, _, _ = decode(model, tree, leaves, ids, params=params)
    tree, leaves, ids = leaves_of(model, slots=16)
    _, alone, _, _ = decode(model, tree, leaves[:1], ids[:1].clone(), params=params[:1])
    assert together[:, 0].tolist() == alone[:, 0].tolist()


def test_stops_when_a_state_turns_negative(model, tmp_path):
    expected, _ = greedy(tmp_path, (3, 1, 4, 1, 5), 8)
    at = next(i for i in range(2, 8) if expected[i] not in expected[:i])
    next_state = torch.zeros(2, VOCAB, dtype=torch.int32)
    next_state[0, expected[0]] = 1  # the first token leads to state 1, where the later one ends the row
    next_state[1] = 1
    next_state[1, expected[at]] = -2
    tree, leaves, ids = leaves_of(model, slots=20, prompts=((3, 1, 4, 1, 5),))
    done, tokens, _, states = decode(model, tree, leaves, ids, next_state=next_state)
    assert (done, states.tolist()) == (at + 1, [-2])
    assert tokens[:done, 0].tolist() == expected[: at + 1]
    assert (tokens[done:] == -7).all()


def test_stops_when_slots_are_used_up(model):
    tree, leaves, ids = leaves_of(model, slots=3)
    assert [leaf.capacity for leaf in leaves] == [16, 16]  # slots come in pages
    done, tokens, _, states = decode(model, tree, leaves, ids, iterations=30)
    assert done == 16 and (states == 0).all() and (tokens[16:] == -7).all()


def test_stops_at_max_positions(impl, tmp_path):
    write_tiny(tmp_path, "llama", max_position_embeddings=12)
    model = load_model(tmp_path, torch.float32, impl)
    tree, leaves, ids = leaves_of(model, slots=30)  # last prompt ids at positions 4 and 2
    done, *_ = decode(model, tree, leaves, ids, iterations=30)
    assert done == 12 - 4


def test_pool_and_costs(model):
    budget = ByteBudget(1 << 20)
    pool = model.new_pool(4, budget)
    assert pool.page_bytes == 16 * model.kv_bytes_per_token and pool.budget is budget
    assert model.flops(9) == model.config.flops(9)


@pytest.mark.parametrize("kv, size", [("int16", 2), ("int8", 1)])
def test_fixed_point_pools_and_costs(impl, tmp_path, kv, size):
    write_tiny(tmp_path, "llama")
    model, plain = load_model(tmp_path, torch.bfloat16, impl, kv=kv), load_model(tmp_path, torch.bfloat16, impl, kv="float")
    c, pool = model.config, model.new_pool(4)
    assert pool.form == kv and pool.k.dtype.itemsize == size
    assert model.kv_bytes_per_token == 2 * c.layers * c.kv_heads * (c.head_dim * size + 4)
    assert pool.page_bytes == 16 * model.kv_bytes_per_token
    assert model.heads.kv_bytes == size + 4 / c.head_dim and plain.heads.kv_bytes == 2
    assert load_model(tmp_path, torch.float32, impl).new_pool(4).form == "float"
    tree = Tree(model)
    node = tree.forest.add(None, [1, 2, 3])
    tree.forest.reserve([node], 0)
    rows = torch.tensor([1, 2, 3], dtype=torch.int32), tree.plan([(node, 0, 3)]), plain.new_pool(4), torch.tensor([2]).int()
    with pytest.raises(ValueError, match=f"pool must have .* form '{kv}', got .* form 'float'; take it from model.new_pool"):
        model.forward(*rows)


def test_what_kv_may_be(tmp_path):
    write_tiny(tmp_path, "llama")
    with pytest.raises(ValueError, match="kv must be one of .*'int16', 'int8'.*, got 'int4'"):
        load_model(tmp_path, kv="int4")
    with pytest.raises(ValueError, match="""kv must be "auto", "float" or "fp8" on a GPU, got 'int8'"""):
        with_kv(load_checkpoint(tmp_path), "int8", "triton")


def test_verifier_has_no_vocabulary_head(impl, tmp_path):
    write_tiny(tmp_path, "qwen2", kind="ForTokenClassification")
    model = load_model(tmp_path, torch.float32, impl)
    assert model.head is not None and model.lm_head is None
    assert model.flops(9) == model.config.flops(9, output="hidden")
    tree = Tree(model)
    root = tree.forest.add(None, [1, 2])
    with pytest.raises(ValueError, match="output must be 'hidden': this model was loaded with a score head and no vocab"):
        tree.run([root])
    with pytest.raises(ValueError, match="decode needs a vocabulary head"):
        decode(model, tree, [], torch.zeros(0, dtype=torch.int32))


def test_prompt_too_long(impl, tmp_path):
    write_tiny(tmp_path, "llama", max_position_embeddings=12)
    tree = Tree(load_model(tmp_path, torch.float32, impl))
    tree.run([tree.forest.add(None, [1] * 12)])
    with pytest.raises(
        ValueError, match="positions must stay below max_positions = 12, got a row at 12; shorten"
    ):
        tree.run([tree.forest.add(None, [1] * 13)])


@pytest.mark.parametrize("bad", [VOCAB, -1])
def test_ids_outside_the_vocabulary(model, bad):
    tree = Tree(model)
    with pytest.raises(ValueError, match=r"ids must be token ids of this model's vocabulary in 0..130, got"):
        tree.run([tree.forest.add(None, [1, bad, 2])])


def test_invalid_arguments(model):
    tree = Tree(model)
    node = tree.forest.add(None, [1, 2, 3])
    tree.forest.reserve([node], 0)
    plan, ids, out = (
        tree.plan([(node, 0, 3)]),
        torch.tensor([1, 2, 3], dtype=torch.int32),
        torch.tensor([2], dtype=torch.int32),
    )
    for arguments, message in (
        ((ids.long(), plan, tree.pool, out), r"ids must be \[3\] torch.int32, got \[3\] torch.int64"),
        ((ids[:2], plan, tree.pool, out), r"ids must be \[3\] torch.int32, got \[2\]"),
        ((ids, plan, tree.pool, out + 1), r"out_rows must be indices in 0..2, got 3..3"),
        ((ids, plan, tree.pool, out, "probs"), "output must be 'logits' or 'hidden', got 'probs'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.forward(*arguments)
    other = type(tree.pool)(2, 4, 64, 4, torch.float32)
    with pytest.raises(ValueError, match=r"pool must have .* \(2, 2, 64\) .* take it from model.new_pool"):
        model.forward(ids, plan, other, out)
    tree, leaves, ids = leaves_of(model, slots=4)
    with pytest.raises(ValueError, match=r"next_state must be \[1, 131\]"):
        decode(model, tree, leaves, ids, next_state=torch.zeros(1, 99, dtype=torch.int32))
    with pytest.raises(ValueError, match="temperature must be"):
        decode(model, tree, leaves, ids, params=torch.tensor([[-1.0, 0, 1, 0]]).repeat(2, 1))


def test_impl_is_honoured(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    write_tiny(tmp_path, "llama")
    with pytest.raises(ValueError, match="impl must be one of"):
        load_model(tmp_path, impl="fast")
    assert load_model(tmp_path, impl="reference").impl == "reference"
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match="impl 'triton' is not available"):
            load_model(tmp_path, impl="triton")
