"""Step by step equals everything at once: any tree, any cut into calls, any batch, through the engine."""

import random

import pytest
import torch
from prm_models import PlainIn, build_prm, load_prm, tokenizer_of
from prm_reference import REFERENCES
from ttsearch.verifiers import FAMILIES, TextVerifier

from ttskernels.engine.batcher import Engine

# one of each layout: per step, whole text (SentencePiece, byte-level), dialogue, a read before the last token
CHOSEN = ["trl", "math-shepherd", "versaprm", "er-prm", "rlhflow-mistral", "qwen-math-prm", "llemma", "reasoneval-7b"]
WORDS = "step 1: equals 12 + 3 - 1 so . the sum of é answer \\boxed{14} ки \n we add [x] <extra_0>".split(" ")
PROBLEM = "what is 12 + ки 3?"


@pytest.fixture(scope="module", params=CHOSEN)
def loaded(request, tmp_path_factory, cpu_extension_once):
    folder = tmp_path_factory.mktemp(request.param)
    plain = build_prm(folder, request.param, seed=3)
    verifier = TextVerifier(tokenizer_of(request.param), FAMILIES[request.param])
    engine = Engine(None, load_prm(folder, torch.float32, verifier.head), kv_bytes=1 << 26)
    yield request.param, verifier, engine, PlainIn(plain)
    engine.shutdown()


@pytest.fixture(scope="module")
def cpu_extension_once():
    from ttskernels import _dispatch

    if reason := _dispatch.load_extension():
        pytest.skip(f"C++ extension: {reason}")


def random_step(rng):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 9)))


def random_tree(rng, size=14):
    """path -> its steps; None is a step without text."""
    paths = [()]
    while len(paths) < size:
        parent = rng.choice(paths)
        paths.append((*parent, random_step(rng) if rng.random() < 0.9 else " \n"))
    return paths[1:]


class Grown:
    """Nodes of an engine session by the steps that led to them."""

    def __init__(self, engine, verifier, problem=PROBLEM):
        self.engine, self.verifier = engine, verifier
        start = verifier.start(problem)
        self.session = engine.open(None, list(start.ids))
        self.at = {(): (self.session.verifier_root, start)}

    def score(self, calls):
        """calls: (path of the parent, new steps); all of them wait at once. Scores of every call's new steps."""
        jobs = []
        for parent, steps in calls:
            node, path = self.at[parent]
            new = self.verifier.extend(path, steps)
            job = self.engine.score(self.session, node, new.ids, new.reads, new.keep) if new.reads else None
            jobs.append((parent, steps, new, job))
        out = []
        for parent, steps, new, job in jobs:
            node, scores = job.result(60) if job else (self.at[parent][0], [])
            self.at[(*parent, *steps)] = (node, new.path)
            by_step = dict(zip(new.owner, scores, strict=True))
            out.append([by_step.get(i) for i in range(len(steps))])
        return out


def chain_of(engine, node):
    return engine._commands.call(lambda: [tuple(n.ids) for n in engine.verifier_forest.path(node)]).result(60)


@pytest.mark.parametrize("seed", range(2))
def test_a_tree_in_any_batches_equals_one_path_alone(loaded, seed):
    """Bitwise where the chain of nodes is the same; within rounding where a sibling has cut it."""
    name, verifier, engine, _ = loaded
    rng = random.Random(f"{name} {seed}")
    tree = random_tree(rng)
    forest, scores, equal = Grown(engine, verifier), {}, 0
    waiting = list(tree)
    while waiting:
        ready = [path for path in waiting if path[:-1] in forest.at]
        batch = rng.sample(ready, rng.randint(1, len(ready)))
        for path, (score,) in zip(batch, forest.score([(path[:-1], path[-1:]) for path in batch]), strict=True):
            scores[path] = score
        waiting = [path for path in waiting if path not in forest.at]
    for path in tree:
        alone = Grown(engine, verifier)
        own = [alone.score([(path[:k], path[k : k + 1])])[0][0] for k in range(len(path))]
        kept = [scores[path[: k + 1]] for k in range(len(path))]
        assert [s is None for s in own] == [not step.strip() for step in path]
        assert [s for s in kept if s is not None] == pytest.approx([s for s in own if s is not None], abs=2e-6)
        if chain_of(engine, forest.at[path][0]) == chain_of(engine, alone.at[path][0]):
            assert kept[-1] == own[-1], "same chain of nodes: same bits"
            equal += 1
        engine.close(alone.session)
    assert equal >= len(tree) // 2
    engine.close(forest.session)


@pytest.mark.parametrize("seed", range(3))
def test_any_cut_into_calls_gives_the_published_last_score(loaded, seed):
    """The last step's score is the published one of the whole text, however its steps came."""
    name, verifier, engine, plain = loaded
    rng = random.Random(f"{name} cut {seed}")
    steps = [random_step(rng).replace("ки", "k").replace("<extra_0>", "e").strip() or "x" for _ in range(6)]
    forest, done = Grown(engine, verifier, "1 + 1?"), ()
    while len(done) < len(steps):
        more = tuple(steps[len(done) : len(done) + rng.randint(1, 3)])
        (scores,) = forest.score([(done, more)])
        done += more
        published = REFERENCES[name](plain, verifier.tokenizer, "1 + 1?", done).scores
        assert scores[-1] == pytest.approx(float(published[-1]), abs=1e-5)
        if verifier.family.tokenise == "step" or name == "rlhflow-mistral":
            assert scores == pytest.approx(published[-len(more) :].tolist(), abs=1e-5)
    engine.close(forest.session)


def test_only_new_tokens_are_read(loaded):
    """Tokens computed are those of the longest text, plus what a later step changed."""
    _, verifier, engine, _ = loaded
    forest, steps = Grown(engine, verifier), ("we add 12 + 3.", "so 15 - 1 equals 14.", "answer \\boxed{14}.")
    spent = len(verifier.start(PROBLEM).ids)
    for k, step in enumerate(steps):
        spent += len(verifier.extend(forest.at[steps[:k]][1], [step]).ids)
        forest.score([(steps[:k], (step,))])
    counters = forest.session.counters
    assert counters.verifier_prefilled == spent
    whole = len(verifier.extend(verifier.start(PROBLEM), steps).path.ids)
    assert whole <= spent <= whole + 2 * len(steps), "at most two tokens rolled back per step"
    engine.close(forest.session)
