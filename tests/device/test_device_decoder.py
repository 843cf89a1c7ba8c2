"""The device decoder against the C++ one and transformers: padded rows, rows that end, pages that run out, large forwards."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import SMALL, rewrite, write_tiny
from trees import Tree

from ttskernels.errors import UnavailableError
from ttskernels.kv.plan import build_plan
from ttskernels.models import device_decoder, load_model
from ttskernels.models.device import check_device

VOCAB = 131


class Loop:
    """`leaves` children of one prompt, each with a token of its own, ready to decode."""

    def __init__(self, model, leaves: int, slots: int = 40):
        self.model, self.tree = model, Tree(model, num_pages=3 + 4 * leaves)
        forest = self.tree.forest
        root = forest.add(None, list(range(2, 21)))
        self.tree.run([root], out=[18])
        self.leaves = forest.fork(root, leaves)
        forest.reserve(self.leaves, slots)
        for i, leaf in enumerate(self.leaves):
            forest.append(leaf, [30 + i])
        self.plan = build_plan(forest, [(leaf, 0, 1) for leaf in self.leaves], model.heads, machine=model.machine)
        self.ids = torch.arange(30, 30 + leaves, dtype=torch.int32)
        self.states = torch.zeros(leaves, dtype=torch.int32)
        self.keys = torch.arange(leaves) * 7919 - 3
        self.params = torch.tensor([[1.0, 0, 1, 0], [0.7, 20, 1, 0], [0.0, 0, 1, 0], [1.3, 0, 0.9, 0.1]])[:leaves]

    def decode(self, iterations: int, table: torch.Tensor):
        """(tokens of each row until it ended, their log-probabilities, iterations)"""
        rows = len(self.leaves)
        tokens, chances = torch.full((iterations, rows), -9, dtype=torch.int32), torch.zeros(iterations, rows)
        done = self.model.decode(
            self.ids, self.plan, self.tree.pool, self.keys, self.params, table, self.states, tokens, chances
        )
        columns = [[t for t in column if t >= 0] for column in tokens[:done].T.tolist()]
        assert all(-1 not in column[: len(mine)] for column, mine in zip(tokens.T.tolist(), columns, strict=True))
        return columns, [chances[: len(mine), i] for i, mine in enumerate(columns)], done

    def written(self) -> set[tuple[int, int]]:
        """(page, slot) that hold a K or V."""
        k, v = (t[:, :, :, 0].isfinite().any(-1).any(0) for t in (self.tree.pool.k, self.tree.pool.v))
        assert torch.equal(k, v)
        return {tuple(at) for at in k.nonzero().tolist()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny(folder, "qwen3", **SMALL)  # q / k norms
    return folder


def one_by_one(folder, rows: int, iterations: int, table: torch.Tensor):
    """What every row decodes on the host, and its end state, going on by itself after others have ended."""
    loop = Loop(load_model(folder, torch.float32, "reference"), rows)
    ids, states, columns = loop.ids.tolist(), [0] * rows, [[] for _ in range(rows)]
    active = list(range(rows))
    for _ in range(iterations):
        if not active:
            break
        forest, leaves = loop.tree.forest, [loop.leaves[r] for r in active]
        last = [(leaf, len(leaf.ids) - 1, 1) for leaf in leaves]
        plan = build_plan(forest, last, loop.model.heads, machine=loop.model.machine)
        part = torch.tensor([ids[r] for r in active], dtype=torch.int32)
        state, token = torch.tensor([states[r] for r in active], dtype=torch.int32), torch.zeros(1, len(active))
        token = token.int()
        loop.model.decode(
            part, plan, loop.tree.pool, loop.keys[active], loop.params[active], table, state, token, token.float()
        )
        forest.mark_cached(leaves)
        for r, t, s in zip(active, token[0].tolist(), state.tolist(), strict=True):
            columns[r].append(t)
            ids[r], states[r] = t, s
            forest.append(loop.leaves[r], [t])
        active = [r for r in active if states[r] >= 0]
    return columns, states


@pytest.mark.parametrize("rows, own_rows", [(3, "0"), (4, "0"), (3, "4")])
def test_rows_go_on_when_others_end(device, folder, rows, own_rows, monkeypatch):
    """Three rows in a bucket of four, and four: every row decodes what it would alone, and nothing else is written."""
    table = torch.zeros(1, VOCAB, dtype=torch.int32)
    table[0, ::6], table[0, 1::13] = -1, -2
    monkeypatch.setenv("TTSK_GPU_LINEAR_ROWS", own_rows)
    loop = Loop(load_model(folder, torch.float32, "triton", device=device), rows)
    before = loop.written()
    columns, chances, done = loop.decode(30, table)
    expected, states = one_by_one(folder, rows, done, table)
    assert columns == expected and loop.states.tolist() == states
    assert max(map(len, columns)) == done and min(map(len, columns)) < done
    first_end = min(len(c) for c, s in zip(columns, states, strict=True) if s < 0)
    assert done <= first_end + 2 + device_decoder.LINGER  # the host hears of an end one iteration late
    assert all((c <= 0).all() and c.isfinite().all() for c in chances)
    pages = {r: leaf.pages for r, leaf in enumerate(loop.leaves)}
    grown = {(pages[r][i // 16], i % 16) for r, column in enumerate(columns) for i in range(len(column))}
    assert loop.written() == before | grown
    ends = [column[-1] for column in columns]
    assert loop.ids.tolist() == ends


def test_calls_go_on_where_the_last_one_stopped(device, folder):
    """Greedy and sampled, in calls of 2, 1 and 3 iterations over one plan, advanced in between; then out of slots."""
    table = torch.zeros(1, VOCAB, dtype=torch.int32)
    loop = Loop(load_model(folder, torch.float32, "triton", device=device), 3, slots=7)
    whole = one_by_one(folder, 3, 16, table)[0]
    room = [leaf.capacity for leaf in loop.leaves]
    assert room == [16] * 3
    got = [[] for _ in range(3)]
    for iterations, expected in ((2, 2), (1, 1), (3, 3), (99, 10)):
        columns, _, done = loop.decode(iterations, table)
        assert done == expected
        for mine, column in zip(got, columns, strict=True):
            mine.extend(column)
        assert loop.plan.advance() is (len(got[0]) < 16)
    assert got == whole and loop.ids.tolist() == [column[-1] for column in got]


@pytest.mark.parametrize("variant", ["qwen2", "qwen3", "llama_rope3_bias"])
def test_own_products_give_the_logits_of_the_vendors(device, variant, tmp_path, monkeypatch):
    """Biases, head norms, tied and untied heads; with seven rows at most, the prompt goes the vendor's way."""
    write_tiny(tmp_path, variant, **SMALL)
    seen = []
    for own_rows in (0, 7):
        monkeypatch.setenv("TTSK_GPU_LINEAR_ROWS", str(own_rows))
        tree = Tree(load_model(tmp_path, torch.float32, "triton", device=device))
        used = []
        layers = device_decoder.own_layers
        monkeypatch.setattr(device_decoder, "own_layers", lambda *a, layers=layers, used=used: used.append(1) or layers(*a))
        root = tree.forest.add(None, list(range(3, 40)))
        first = tree.run([root], out=[36])
        assert not used
        leaves = tree.forest.fork(root, 3)
        for leaf in leaves:
            tree.grow(leaf, [9])
        seen.append(torch.cat([first.cpu(), tree.run(leaves).cpu()]))
        assert bool(used) == (own_rows > 0)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)


def test_own_rows_must_be_a_number(monkeypatch):
    monkeypatch.setenv("TTSK_GPU_LINEAR_ROWS", "many")
    with pytest.raises(ValueError, match="TTSK_GPU_LINEAR_ROWS must be a number of rows, 0 for none, got 'many'"):
        device_decoder.own_rows()


def test_a_forward_of_many_rows_cuts_its_last_layer(device, folder, monkeypatch):
    """More rows than are ever captured: what is wanted of the last layer alone is computed there, with the same result."""
    seen = []
    for captured in (512, 8):
        monkeypatch.setattr(device_decoder.DeviceDecoder, "captured_rows", captured)
        tree = Tree(load_model(folder, torch.float32, "triton", device=device))
        root = tree.forest.add(None, list(range(3, 40)))
        assert tree.run([tree.forest.add(None, [5, 6, 7, 8, 9, 10, 11, 12, 13])], out=[]).shape == (0, VOCAB)
        seen.append(tree.run([root], out=[36, 4]).cpu())
        grown = tree.forest.fork(root, 1)[0]
        tree.grow(grown, [9])
        seen.append(tree.run([grown]).cpu())
    torch.testing.assert_close(seen[2], seen[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[3], seen[1], rtol=1e-5, atol=1e-5)


def test_a_forward_that_reads_nothing_still_writes(device, folder):
    """A prompt in two forwards, of which the first has no row to read, equals the prompt at once."""
    results = []
    for pieces in ([30], [11, 19]):
        tree = Tree(load_model(folder, torch.float32, "triton", device=device))
        node, ids = None, list(range(9, 39))
        for n in pieces:
            node, ids = tree.forest.add(node, ids[:n]), ids[n:]
            last = tree.run([node], out=[n - 1] if not ids else [])
        results.append(last.cpu())
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_a_graph_is_not_replayed_over_a_pool_of_another_size(device, folder):
    """The allocator may give a smaller pool the very addresses of one that is gone; only its first layer lies the same."""
    model = load_model(folder, torch.float32, "triton", device=device)
    tree, keys = Tree(model, num_pages=9), []
    node = tree.forest.add(None, [1, 2, 3])
    tree.forest.reserve([node], 4)
    rows, launch = model._decoder._prepare(build_plan(tree.forest, [(node, 0, 3)], model.heads, machine=model.machine))
    for pages in (9, 9, 5):
        pool = SimpleNamespace(k=tree.pool.k[:, :pages], v=tree.pool.v[:, :pages])
        keys.append(model._decoder._key("decode", rows, launch, pool))
    assert keys[0] == keys[1] != keys[2]


def test_many_rows_drop_no_graph(device, folder, monkeypatch):
    """A forward of more rows than any before reports nothing; a decode of more than are captured reports in its own place."""
    monkeypatch.setattr(device_decoder, "BUCKETS", (2,))
    monkeypatch.setattr(device_decoder.DeviceDecoder, "captured_rows", 2)
    model, table = load_model(folder, torch.float32, "triton", device=device), torch.zeros(1, VOCAB, dtype=torch.int32)
    queue = model._decoder.queue
    monkeypatch.setattr(queue, "forget_graphs", lambda: pytest.fail("nothing that captured work reads has moved"))
    columns, _, done = Loop(model, 3).decode(3, table)
    assert done == 3 and columns == one_by_one(folder, 3, 3, table)[0]


def test_weights_that_are_not_finite(device, tmp_path):
    write_tiny(tmp_path, "llama", **SMALL)
    rewrite(tmp_path, lambda tensors: tensors["lm_head.weight"][5].fill_(float("inf")))
    loop = Loop(load_model(tmp_path, torch.float32, "triton", device=device), 2)
    with pytest.raises(ValueError, match="finite"):
        loop.decode(3, torch.zeros(1, VOCAB, dtype=torch.int32))


def test_a_bad_row_that_only_the_device_saw():
    states = torch.tensor([0, -1, device_decoder.BAD_LOGITS], dtype=torch.int32)
    with pytest.raises(ValueError, match="logits of row 2 are not finite after 3 iterations"):
        device_decoder.DeviceDecoder._check(states, 3)
    device_decoder.DeviceDecoder._check(states[:2], 3)


def test_buckets_hold_their_rows():
    assert sorted(device_decoder.BUCKETS) == list(device_decoder.BUCKETS)
    assert all(b <= 2 * a for a, b in zip(device_decoder.BUCKETS, device_decoder.BUCKETS[1:], strict=False))


def test_what_is_not_there_is_refused(folder):
    for wrong in ("mps", "tpu", "gpu"):
        with pytest.raises(ValueError, match=f'device must be "cpu" or "cuda" .*got {wrong!r}'):
            load_model(folder, device=wrong)
    with pytest.raises(ValueError, match="impl must be \"auto\" or \"triton\" on device 'cuda', got 'cpu'"):
        load_model(folder, impl="cpu", device="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match="device 'cuda' is not available: no GPU is visible to torch"):
            load_model(folder, device="cuda")
    assert check_device("cpu", "auto") == (torch.device("cpu"), "auto")
