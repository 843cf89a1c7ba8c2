"""The whole decoder over the Triton ops: logits of a walk equal transformers', decoding picks the reference's tokens."""

import pytest
import torch
from tiny_models import write_tiny
from transformers import AutoModelForCausalLM
from trees import Tree, expected, stack, walk

from ttskernels.models import load_model

VOCAB = 131


@pytest.fixture(autouse=True)
def interpreter_only(device):
    if device.type != "cpu":
        pytest.skip("models are loaded onto the CPU: this needs the interpreter (TRITON_INTERPRET=1, no GPU)")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["qwen3", "mistral_window"])
def test_logits(variant, tmp_path):
    write_tiny(tmp_path, variant)
    seen = walk(load_model(tmp_path, torch.float32, "triton"), VOCAB)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    exact = expected(lambda ids: theirs(ids).logits, seen)
    assert (stack(seen) - exact).abs().max() / exact.std() <= 1e-4


def test_decode_equals_the_reference(tmp_path):
    write_tiny(tmp_path, "llama")
    results = []
    for impl in ("triton", "reference"):
        model = load_model(tmp_path, torch.float32, impl)
        tree = Tree(model)
        root = tree.forest.add(None, list(range(2, 21)))
        tree.run([root], out=[18])
        leaves = tree.forest.fork(root, 3)
        tree.forest.reserve(leaves, 6)
        for leaf in leaves:
            tree.forest.append(leaf, [3])
        plan = tree.plan([(leaf, 0, 1) for leaf in leaves])
        tokens, logprobs = torch.zeros(3, 3, dtype=torch.int32), torch.zeros(3, 3)
        done = model.decode(
            torch.full((3,), 3, dtype=torch.int32), plan, tree.pool, torch.tensor([5, 6, 7]),
            torch.tensor([[1.0, 0, 1, 0], [0.7, 20, 0.9, 0], [0.0, 0, 1, 0]]),
            torch.zeros(1, VOCAB, dtype=torch.int32), torch.zeros(3, dtype=torch.int32), tokens, logprobs,
        )  # fmt: skip
        results.append((done, tokens, logprobs))
    assert results[0][0] == results[1][0] == 3
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-4)
