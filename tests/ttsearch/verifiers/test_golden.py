"""Every family against its published procedure in plain transformers: ids, read positions, scores."""

import pytest
import torch
from prm_models import LAYOUTS, PlainIn, build_prm, load_prm, tokenizer_of
from prm_reference import REFERENCES
from ttsearch.verifiers import FAMILIES, TextVerifier

from ttskernels.engine.batcher import Engine

PROBLEM = "Question: what is 12 + 3 - 1, and why?"
STEPS = ["Step 1: we add 12 + 3 = 15.", "so the sum of 15 - 1 is 14, é.", "Therefore\nthe answer equals \\boxed{14}."]


@pytest.fixture(scope="module", params=LAYOUTS)
def prm(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, build_prm(folder, request.param)


def read_all(verifier, problem, steps):
    """All steps at once: ids of the whole path, positions in it."""
    new = verifier.extend(verifier.start(problem), steps)
    assert new.owner == list(range(len(steps)))
    return list(new.path.ids), [new.keep + read for read in new.reads]


def score_stepwise(folder, verifier, problem, steps, dtype):
    """One step after another through the engine."""
    engine = Engine(None, load_prm(folder, dtype, verifier.head), kv_bytes=1 << 24)
    path = verifier.start(problem)
    session = engine.open(None, list(path.ids))
    node, scores = session.verifier_root, []
    for step in steps:
        new = verifier.extend(path, [step])
        node, score = engine.score(session, node, new.ids, new.reads, new.keep).result(60)
        path, scores = new.path, scores + score
    engine.shutdown()
    return torch.tensor(scores)


def test_registry_is_covered():
    elsewhere = {"implicit", "judge"}  # two models, and a question of one's own: test_implicit.py, test_judge.py
    assert set(LAYOUTS) == set(REFERENCES) == set(FAMILIES) - elsewhere


def test_ids_and_positions(prm):
    family, _, plain = prm
    tokenizer = tokenizer_of(family)
    for steps in (STEPS[:1], STEPS, [*STEPS, *STEPS[:2]]):
        published = REFERENCES[family](PlainIn(plain), tokenizer, PROBLEM, steps)
        ids, positions = read_all(TextVerifier(tokenizer, FAMILIES[family]), PROBLEM, steps)
        assert positions == published.positions
        assert ids[: positions[-1] + 1] == published.ids[: positions[-1] + 1], "what follows the last read is never read"


def test_scores(prm, cpu_extension):
    family, folder, written = prm
    tokenizer = tokenizer_of(family)
    verifier = TextVerifier(tokenizer, FAMILIES[family])
    plain = {dtype: PlainIn(written, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    ours, low, exact = [], [], []
    for problem in (PROBLEM, "1 + 1", "a longer one: is the sum of 2 - 3 + 4 equals 3?"):
        prefixes = [STEPS[: k + 1] for k in range(len(STEPS))]  # a step's first score is kept: that of the text so far
        scores = {
            dtype: torch.stack([REFERENCES[family](p, tokenizer, problem, steps).scores[-1] for steps in prefixes])
            for dtype, p in plain.items()
        }
        own = score_stepwise(folder, verifier, problem, STEPS, torch.float32)
        relative = 1e-5 if FAMILIES[family].unbounded else 0
        torch.testing.assert_close(own, scores[torch.float32], atol=1e-5, rtol=relative)
        ours.append(score_stepwise(folder, verifier, problem, STEPS, torch.bfloat16))
        low.append(scores[torch.bfloat16])
        exact.append(scores[torch.float64])
    exact = torch.cat(exact)
    error, budget = ((torch.cat(s).double() - exact).square().mean().sqrt() for s in (ours, low))
    assert error <= 2 * budget, f"bf16 error {error:.2e}, plain transformers' own {budget:.2e}"
