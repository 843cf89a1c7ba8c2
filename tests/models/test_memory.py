"""A model that only scores: neither its weights nor the memory of a forward grow with the vocabulary (but the embedding)."""

import pytest
import torch
from memory import peak_bytes
from tiny_models import write_tiny
from trees import Tree

from ttskernels.models import HeadSpec, Model, load_checkpoint, load_model
from ttskernels.models.decoder import PythonDecoder
from ttskernels.ops.linear import linear_pack
from ttskernels.ops.step_score import step_score
from ttskernels.ops.token_logprob import token_logprob

VOCABS = (1_000, 100_000)
HIDDEN = 64
HEADS = {  # kind of checkpoint, how it is read
    "value head": ("ForTokenClassification", None),
    "vocabulary rows": ("ForCausalLM", HeadSpec(rows=(5, 9), mix=(1.0, 0.0))),
    "vocabulary mean": ("ForCausalLM", HeadSpec(vocab_mean=True, squash="sigmoid", mix=(1.0,))),
}


def load(folder, name, impl):
    kind, head = HEADS[name]
    if impl != "cpu-ops":
        return load_model(folder, torch.float32, impl, head)
    checkpoint = load_checkpoint(folder, torch.float32, head)
    decoder = PythonDecoder(checkpoint.config, checkpoint.weights, "cpu", lm_head=checkpoint.keeps_lm_head)
    return Model(checkpoint, decoder, "cpu")


def score(model):
    """A prompt, then eight branches of 20 tokens, one read each."""
    tree, head = Tree(model), model.head
    root = tree.forest.add(None, list(range(40)))
    tree.run([root], out=[], output="hidden")
    leaves = tree.forest.fork(root, 8)
    for i, leaf in enumerate(leaves):
        tree.grow(leaf, list(range(i, i + 20)))
    hidden = tree.run(leaves, out=range(19, 160, 20), output="hidden")
    return step_score(
        hidden, torch.arange(8, dtype=torch.int32), head.weight, bias=head.bias, norm_weight=model.norm,
        eps=model.config.rms_eps, squash=head.squash, mix=head.mix,
    )  # fmt: skip


@pytest.mark.parametrize("impl", ["reference", "cpu", "cpu-ops"])
@pytest.mark.parametrize("name", HEADS)
def test_scoring_does_not_grow_with_the_vocabulary(name, impl, tmp_path, request):
    if impl != "reference":
        request.getfixturevalue("cpu_extension")
    peaks, weights, scratch = [], [], []
    for vocab in VOCABS:
        folder = tmp_path / str(vocab)
        write_tiny(folder, "llama", kind=HEADS[name][0], vocab_size=vocab, num_hidden_layers=1)
        model = load(folder, name, impl)
        assert score(model).isfinite().all()
        peaks.append(peak_bytes(lambda model=model: score(model)))
        if impl == "cpu":
            native_weights, native_scratch = model._decoder.memory_bytes()
            weights.append(native_weights)
            scratch.append(native_scratch)
        else:
            weights.append(sum(p.data.nbytes for p in model._decoder.packed.values()) + model._decoder.embed.nbytes)
        assert model.lm_head is None
    assert peaks[0] == peaks[1] > 0
    assert weights[1] - weights[0] == (VOCABS[1] - VOCABS[0]) * HIDDEN * 4
    assert impl != "cpu" or scratch[0] == scratch[1] > 0


@pytest.mark.parametrize("packed", [False, True])
def test_token_logprob_does_not_grow_with_the_vocabulary(packed, cpu_extension):
    hidden, rows = torch.randn(50, HIDDEN), torch.arange(50, dtype=torch.int32)
    peaks = []
    for vocab in VOCABS:
        lm_head = torch.randn(vocab, HIDDEN)
        weight = linear_pack(lm_head) if packed else lm_head
        peaks.append(peak_bytes(lambda weight=weight: token_logprob(hidden, rows, weight, rows)))
    assert peaks[0] == peaks[1] > 50 * HIDDEN * 4
    assert peak_bytes(lambda: hidden @ lm_head.T) >= 50 * VOCABS[1] * 4  # what is counted, and what is avoided
