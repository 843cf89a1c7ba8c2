"""What others hear when the engine stops, and what one problem's bad logits cost the rest."""

import queue
import shutil
import threading

import pytest
from engines import Search, make_engine, run_together
from tiny_models import rewrite, write_tiny

from ttskernels.engine.keys import root_key
from ttskernels.engine.work import Sampling

PROMPT = [3, 9, 11, 24, 90, 17, 33, 2, 8, 120]
STOPPED = "the engine was shut down; make another one"


def grow(engine, session, events, tokens=200):
    engine.branch(session, session.root, key=root_key(0, "x"), ordinals=range(8), path_key=(), sampling=Sampling(1.0),
                  max_step_tokens=tokens, max_length=230, max_steps=99, on_step=lambda o, end: events.put(end))  # fmt: skip


def test_after_shutdown_work_is_refused_and_tidying_does_nothing(folders):
    engine = make_engine(*folders)
    session = engine.open(PROMPT, PROMPT, max_new_tokens=20)
    engine.shutdown()
    for work in (
        lambda: engine.open(PROMPT, PROMPT, max_new_tokens=20),
        lambda: engine.score(session, session.verifier_root, [9], [0]),
        lambda: engine.extend(session, session.root, [9]),
        lambda: grow(engine, session, queue.SimpleQueue()),
    ):
        with pytest.raises(RuntimeError, match=STOPPED):
            work()
    engine.cancel(object())
    engine.release(session, policy=[session.root])
    engine.close(session)
    engine.forget_prompts()


def test_whoever_waits_hears_of_a_shutdown(folders):
    engine = make_engine(*folders)
    session = engine.open(PROMPT, PROMPT, max_new_tokens=200)
    events, heard = queue.SimpleQueue(), []

    def ask():
        try:
            while True:
                node, _ = engine.score(session, session.verifier_root, [9, 8, 7], [2]).result(60)
                engine.release(session, verifier=[node])
        except RuntimeError as error:
            heard.append(str(error))

    grow(engine, session, events)
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    events.get(timeout=60)
    engine.shutdown()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    ends = []
    while not ends or not isinstance(ends[-1], BaseException):
        ends.append(events.get(timeout=60))
    assert str(ends[-1]) == STOPPED
    assert len(heard) == 3 and all(STOPPED in error for error in heard)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_logits_that_are_not_finite_end_their_own_branches_alone(tmp_path, folders, impl, cpu_extension):
    good, bad = tmp_path / "good", tmp_path / "bad"
    write_tiny(good, "llama", seed=1, tie_word_embeddings=False)
    shape = dict(width=4, keep=2, depth=2, step_tokens=8)
    engine = make_engine(good, folders[1], impl=impl)
    prompts = [PROMPT, [5 + t for t in PROMPT], PROMPT[:6]]
    trees = run_together([Search(engine, p, seed=4, **shape) for p in prompts])
    engine.shutdown()
    used = [{t for ids, *_ in tree.values() for t in ids} for tree in trees]
    inner = {t for ids, *_ in trees[2].values() for t in ids[:-1]}  # read again while their step goes on
    token = min(inner - used[0] - used[1] - set(sum(prompts, [])))

    shutil.copytree(good, bad)
    rewrite(bad, lambda tensors: tensors["model.embed_tokens.weight"][token].fill_(float("inf")))
    engine = make_engine(bad, folders[1], impl=impl, ahead_rows=64)
    searches = [Search(engine, p, seed=4, **shape) for p in prompts]
    third, others = searches[2], searches[:2]
    for search in searches:
        search.start()
    with pytest.raises(ValueError, match="finite"):
        for _ in range(shape["depth"]):
            for search in searches:
                search.submit()
            for search in others:
                search.finish_step()
            third.finish_step()
    with pytest.raises(ValueError, match="finite"):  # in a prompt
        Search(engine, [*PROMPT, token], seed=4, **shape).run()
    for search in searches:
        engine.close(search.session)
    again = run_together([Search(engine, p, seed=4, **shape) for p in prompts[:2]])
    assert [texts(tree) for tree in again] == [texts(tree) for tree in trees[:2]]
    assert [texts(search.tree) for search in others] == [{p: t for p, t in texts(tree).items() if p in s.tree}
                                                         for tree, s in zip(trees, others, strict=False)]  # fmt: skip
    assert all(s.tree for s in others)
    engine.shutdown()


def texts(tree):
    return {path: end[:2] for path, end in tree.items()}  # scores of the reference depend on the batch in the last bits
