"""The TRL reward function, called as `GRPOTrainer` calls one."""

import sys

import pytest
from prm_models import write_prm
from ttsearch.backend import load_verifier
from ttsearch.integrations.trl import PrmReward
from ttsearch.scoring import score_steps


@pytest.fixture(scope="module")
def verifier(tmp_path_factory):
    folder = write_prm(tmp_path_factory.mktemp("trl"), "trl", seed=3)
    with load_verifier(folder, "trl", dtype="fp32", kv_bytes=1 << 26) as verifier:
        yield verifier


def test_rewards_in_order_with_every_argument_the_trainer_passes(verifier):
    reward = PrmReward(verifier, aggregate="mean")
    prompts = ["1 + 2?", "1 + 2?", "3 + 4?"]
    completions = ["so 3\n\nanswer 3", "so 4", "so 7"]
    rewards = reward(
        prompts=prompts, completions=completions, completion_ids=[[1], [2], [3]], trainer_state=object(), answer=["3"] * 3
    )
    expected = score_steps(prompts, [[c] for c in completions], verifier)
    assert rewards == [result.mean for (result,) in expected] and all(isinstance(r, float) for r in rewards)
    assert reward.__name__ == "prm_reward" and "trl" not in sys.modules
    reward.close()
    assert PrmReward(verifier, "mean", name="steps").__name__ == "steps"


def test_conversations(verifier):
    reward = PrmReward(verifier, "last")
    system = {"role": "system", "content": "be brief"}
    prompts = [[system, {"role": "user", "content": "1 + 2?"}]]
    completions = [[{"role": "assistant", "content": "so 3\n\nanswer 3"}]]
    assert reward(prompts, completions) == reward(["1 + 2?"], ["so 3\n\nanswer 3"])
    with pytest.raises(ValueError, match="must have one user turn"):
        reward([[system]], completions)


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def test_content_in_parts_and_tool_calls(verifier):
    reward, answer = PrmReward(verifier, "last"), "so 3\n\nanswer 3"
    (expected,) = reward(["1 + 2?"], [answer])
    prompts = [[{"role": "user", "content": [{"type": "image"}, *parts("1 + ", "2?")]}]] * 4
    completions = [
        [{"role": "assistant", "content": parts("so 3\n\nans", "wer 3")}],
        [{"role": "assistant", "content": None, "tool_calls": [1]}, {"role": "tool", "content": "3"},
         {"role": "assistant", "content": answer}],
        [{"role": "assistant", "tool_calls": [1]}, {"role": "assistant", "content": answer}],
        [{"role": "assistant", "content": None, "tool_calls": [1]}],
    ]  # fmt: skip
    assert reward(prompts, completions) == [expected] * 3 + [None]
    for content in (3, {"text": "so"}, ["so"], [{"type": "text"}]):
        with pytest.raises(ValueError, match="content of a message must be a text, a list of parts such as .*, or None, got"):
            reward(["q"], [[{"role": "assistant", "content": content}]])


def test_a_lone_surrogate_spoils_nothing(verifier):
    reward = PrmReward(verifier)
    rewards = reward(["q"] * 2, ["so", "x \ud83d"])
    assert rewards == [*reward(["q"], ["so"]), *reward(["q"], ["x \ufffd"])]


def test_what_cannot_be_scored_gets_none(verifier):
    reward = PrmReward(verifier)
    assert reward(["q"] * 3, [" \n\n", "so " * verifier.text.max_length, "so"])[:2] == [None, None]
    assert reward([], []) == []


def test_bad_arguments(verifier):
    with pytest.raises(ValueError, match="aggregate must be one of"):
        PrmReward(verifier, "max")
    with pytest.raises(ValueError, match=r"dtype, nonsense: no such argument, or one for loading a verifier, and trl\d+ \(trl, "):
        PrmReward(verifier, dtype="fp64", nonsense=1)
    with pytest.raises(ValueError, match="must be of one length, got 1 and 0"):
        PrmReward(verifier)(["q"], [])


def test_a_reward_loaded_from_a_path_is_closed_here(tmp_path):
    reward = PrmReward(write_prm(tmp_path, "trl", seed=3), family="trl", dtype="fp32", kv_bytes=1 << 24)
    assert 0 <= reward(["q"], ["so"])[0] <= 1
    reward.close()
    assert not reward.verifier.engine._thread.is_alive()
