"""reward-hub's PRM interface, by the signature of its 0.1.10 backends."""

import enum
import inspect
import sys

import pytest
from prm_models import write_prm
from ttsearch.backend import load_verifier
from ttsearch.integrations.reward_hub import PRMResult, ProcessRewardModel
from ttsearch.scoring import score_steps


class AggregationMethod(enum.Enum):  # as reward_hub.base has it
    MODEL = "model"
    PRODUCT = "prod"
    MIN = "min"
    LAST = "last"


@pytest.fixture(scope="module")
def verifier(tmp_path_factory):
    folder = write_prm(tmp_path_factory.mktemp("trl"), "trl", seed=3)
    with load_verifier(folder, "trl", dtype="fp32", kv_bytes=1 << 26) as verifier:
        yield verifier


def conversation(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_signature():
    parameters = list(inspect.signature(ProcessRewardModel.score).parameters)
    assert parameters == [
        "self", "messages", "max_input_tokens", "step_sep", "aggregation_method", "return_full_prm_result", "use_tqdm",
    ]  # fmt: skip
    assert "reward_hub" not in sys.modules


def test_scores_and_full_results(verifier, capsys):
    model = ProcessRewardModel(verifier)
    messages = [conversation("1 + 2?", "so 3\n\nanswer 3"), conversation("1 + 2?", "so 3\n\nanswer 4")]
    ((first,), (second,)) = score_steps(["1 + 2?"] * 2, [["so 3\n\nanswer 3"], ["so 3\n\nanswer 4"]], verifier)
    assert model.score(messages) == [first.last, second.last]
    assert model.score(messages, aggregation_method="min", use_tqdm=True) == [min(first.scores), min(second.scores)]
    assert "2 of 2 conversations" in capsys.readouterr().err
    assert model.score(messages[0], aggregation_method=AggregationMethod.PRODUCT) == pytest.approx([first.product])
    full = model.score(messages, return_full_prm_result=True, aggregation_method="min")
    assert isinstance(full[0], PRMResult) and full[0].step_scores == first.scores and full[0].score == full[0].min
    assert full[1].last == second.last and full[1].product == pytest.approx(second.product)
    model.close()


def test_model_aggregation_reads_the_whole_turn_as_one_step(verifier):
    model = ProcessRewardModel(verifier)
    result = model.score(conversation("q", "so\n\nwe"), aggregation_method="model", return_full_prm_result=True)[0]
    assert len(result.step_scores) == 1 and result.score == result.last
    assert model.score(conversation("q", "so|we"), step_sep="|", return_full_prm_result=True)[0].step_scores[1:]


def test_content_in_parts(verifier):
    model = ProcessRewardModel(verifier)

    def parts(text):
        return [{"type": "text", "text": text}]

    expected = model.score(conversation("1 + 2?", "so 3\n\nanswer 3"), return_full_prm_result=True)[0].step_scores
    got = model.score(conversation(parts("1 + 2?"), parts("so 3\n\nanswer 3")), return_full_prm_result=True)[0].step_scores
    assert got == expected and len(got) == 2
    for message in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        with pytest.raises(ValueError, match="has no step"):
            model.score([{"role": "user", "content": "q"}, message])


def test_bad_arguments(verifier):
    model = ProcessRewardModel(verifier)
    with pytest.raises(ValueError, match="dtype, nonsense: no such argument, or one for loading a verifier"):
        ProcessRewardModel(verifier, dtype="fp64", nonsense=1)
    with pytest.raises(ValueError, match="aggregation_method must be one of model, prod, min, last, got 'max'"):
        model.score(conversation("q", "so"), aggregation_method="max")
    with pytest.raises(ValueError, match="at least one conversation"):
        model.score([])
    with pytest.raises(ValueError, match=r"messages\[0\] must end with the assistant's turn"):
        model.score([{"role": "user", "content": "q"}])
    with pytest.raises(ValueError, match="must have one user turn"):
        model.score([*conversation("q", "a"), *conversation("r", "b")])
    with pytest.raises(ValueError, match=r"messages\[0\] took \d+ tokens, max_input_tokens is 3"):
        model.score(conversation("q", "so we add"), max_input_tokens=3)
    with pytest.raises(ValueError, match=r"messages\[0\]: the path has"):
        model.score(conversation("q", "so " * verifier.text.max_length))
