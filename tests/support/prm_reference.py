"""The published scoring procedure of each PRM family in plain transformers: own texts, own search for markers.

Written from the publications and their code, not from ttsearch. `REFERENCES[family](prm, tokenizer, problem, steps)` gives
the ids, the positions of the scores and the scores; `prm.logits(ids)` are the checkpoint's `[tokens, labels or vocab]`.
Where a procedure finds markers by their id, steps and problems here must not contain them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass
class Scored:
    ids: list[int]
    positions: list[int]
    scores: torch.Tensor


def where(ids: list[int], token: int) -> list[int]:
    return [i for i, t in enumerate(ids) if t == token]


def rows(prm, ids, positions, tokens, good) -> Scored:
    return Scored(ids, positions, prm.logits(ids)[:, tokens].softmax(-1)[positions, good])


def math_shepherd(prm, tokenizer, problem, steps):
    ids = tokenizer.encode(f"{problem} " + "\n".join(f"{step} ки" for step in steps))
    return rows(prm, ids, where(ids, tokenizer.encode("ки")[-1]), tokenizer.encode("+ -")[1:], 0)


def rlhflow(prm, tokenizer, problem, steps):
    """Reserved tokens stand where the answers are, so that they can be found; then they become "+"."""
    turns = []
    for k, step in enumerate(steps):
        turns.append({"role": "user", "content": f"{problem} {step}" if k == 0 else step})
        turns.append({"role": "assistant", "content": "<|reserved_special_token_0|>"})
    ids = list(tokenizer.apply_chat_template(turns)["input_ids"])
    plus, minus = tokenizer.encode("+")[-1], tokenizer.encode("-")[-1]
    answers = where(ids, tokenizer.convert_tokens_to_ids("<|reserved_special_token_0|>"))
    ids = [plus if i in answers else token for i, token in enumerate(ids)]
    return rows(prm, ids, [i - 1 for i in answers], [plus, minus], 0)


def skywork(prm, tokenizer, problem, steps):
    answer = "\n".join(step.replace("\n", " ").strip() for step in steps)
    answer = answer.replace("\n", "<|vision_start|>") + "<|vision_start|>"
    prompt, answer = tokenizer.encode(tokenizer.bos_token + problem + "\n"), tokenizer.encode(answer)
    ends = where(answer, tokenizer.convert_tokens_to_ids("<|vision_start|>"))
    newline = tokenizer.encode("\n")[-1]
    ids = prompt + [newline if i in ends else token for i, token in enumerate(answer)]
    positions = [len(prompt) + i for i in ends]
    return Scored(ids, positions, prm.logits(ids)[positions, 0].sigmoid())


def qwen_math_prm(prm, tokenizer, problem, steps):
    turns = [
        {"role": "system", "content": "Please reason step by step, and put your final answer within \\boxed{}."},
        {"role": "user", "content": problem},
        {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"},
    ]
    ids = list(tokenizer.apply_chat_template(turns)["input_ids"])
    positions = where(ids, tokenizer.encode("<extra_0>")[0])
    return Scored(ids, positions, prm.logits(ids).softmax(-1)[positions, 1])


def math_psa(prm, tokenizer, problem, steps):
    ids = tokenizer.encode(f"{problem} " + "".join(f"{step} \n\n\n\n\n" for step in steps))
    (tag,) = tokenizer.encode(" \n\n\n\n\n")
    return rows(prm, ids, where(ids, tag), tokenizer.encode(" + -"), 0)


def er_prm(prm, tokenizer, problem, steps):
    ids = tokenizer.encode(f"{problem} " + "".join(f"{step} ки\n" for step in steps).replace(" ки\n", " ки"))
    tokens = [tokenizer.encode(" +")[-1], tokenizer.encode(" -")[-1]]
    return rows(prm, ids, where(ids, tokenizer.encode(" ки")[-1]), tokens, 0)


def versaprm(prm, tokenizer, problem, steps):
    ids = tokenizer.encode(f"{problem.strip()} \n\n" + "".join(f"{step.strip()} \n\n\n\n" for step in steps))
    marker = tokenizer.encode(" \n\n\n\n", add_special_tokens=False)
    assert len(marker) == 1
    return rows(prm, ids, where(ids, marker[0]), [12, 10], 1)


def numbered(steps: list[str]) -> list[str]:
    return [f"Step {k + 1}: " + re.sub(r"^Step \d+:", "", step).strip() for k, step in enumerate(steps)]


def pqm(prm, tokenizer, problem, steps):
    query = (
        "Below is an instruction that describes a task.\nWrite a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{problem}\n\n### Response: Let's think step by step"
    )
    answer = " [PRM]\n".join(numbered(steps)) + " [PRM]"
    ids = tokenizer.encode(f"{query}\n{answer}", add_special_tokens=False)
    positions = where(ids, tokenizer.encode("[PRM]", add_special_tokens=False)[-1])
    return Scored(ids, positions, prm.logits(ids)[positions, 0])


def separated(tokenizer, problem, steps, separator, front=()):
    ids = [*front, *tokenizer.encode(problem, add_special_tokens=False)]
    positions = []
    for step in steps:
        ids += tokenizer.encode(step, add_special_tokens=False)
        ids += tokenizer.encode(separator, add_special_tokens=False)
        positions.append(len(ids) - 1)
    return ids, positions


def pure(prm, tokenizer, problem, steps):
    ids, positions = separated(tokenizer, problem, steps, "\n\n")
    probabilities = prm.logits(ids).softmax(-1)[positions]
    return Scored(ids, positions, probabilities[:, 1] - probabilities[:, 0])


def trl(prm, tokenizer, problem, steps, separator="\n"):
    front = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    ids, positions = separated(tokenizer, problem, steps, separator, front)
    return Scored(ids, positions, prm.logits(ids).softmax(-1)[positions, 1])


def trl_blank_line(prm, tokenizer, problem, steps):
    return trl(prm, tokenizer, problem, steps, "\n\n")


def llemma(prm, tokenizer, problem, steps):
    ids = tokenizer.encode(f"# Question\n\n{problem}\n\n# Solution\n\n" + "".join(f"{step}\n\n" for step in steps))
    begin = tokenizer.encode("# Solution", add_special_tokens=False)[1:]
    blank = tokenizer.encode("\n\n", add_special_tokens=False)[1:]
    begun = next(i for i in range(len(ids)) if ids[i : i + len(begin)] == begin)
    positions = [i for i in range(begun, len(ids)) if ids[i : i + len(blank)] == blank]
    del positions[0]  # behind "# Solution"
    return Scored(ids, positions, prm.logits(ids).mean(-1).sigmoid()[positions])


def rebase(prm, tokenizer, problem, steps):
    """Steps end with a full stop here: the procedure marks each ".\\n", and adds a marker at the very end, which is dropped."""
    cot = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    solution = "\n" + "".join(f"{step}\n" for step in steps)
    ids = tokenizer.encode(problem + cot + solution.replace(".\n", ".\n ки ") + " ки ")
    positions = where(ids, tokenizer.encode(" ки")[-1])[:-1]
    return Scored(ids, positions, prm.logits(ids).mean(-1).sigmoid()[positions])


def mathminos(prm, tokenizer, problem, steps):
    text = "".join(f"{step} и\n" for step in numbered(steps))
    ids = tokenizer.encode(f"Human: {problem}\n\nAssistant:{text}")
    positions = where(ids, tokenizer.encode("и")[-1])
    return Scored(ids, positions, prm.logits(ids)[positions, 0])


def reasoneval(prm, tokenizer, problem, steps, skipped, front):
    separator = tokenizer.pad_token
    prompt = f"Question:\n{problem}\nAnswer:\nLet's think step by step.\n"
    tokens = tokenizer(prompt + separator + "".join(step + separator for step in steps))["input_ids"]
    separator_id = tokenizer(separator)["input_ids"][-1]
    ids, positions = [], []
    for i, token in enumerate(tokens):
        if token == separator_id:
            positions.append(i - 1 - len(positions))
        else:
            ids.append(token)
    ids, positions = front + ids, positions[skipped:]
    probabilities = prm.logits(ids).softmax(-1)[positions]
    return Scored(ids, positions, probabilities[:, 1] + probabilities[:, 2])


def reasoneval_7b(prm, tokenizer, problem, steps):
    """Its pad token is its bos token: the first separator is the bos, and all are dropped before one is put back."""
    assert tokenizer.pad_token_id == tokenizer.bos_token_id == 1
    return reasoneval(prm, tokenizer, problem, steps, 2, [1])


def reasoneval_34b(prm, tokenizer, problem, steps):
    return reasoneval(prm, tokenizer, problem, steps, 1, [])


REFERENCES = {
    "math-shepherd": math_shepherd,
    "mathminos": mathminos,
    "rlhflow-mistral": rlhflow,
    "rlhflow-deepseek": rlhflow,
    "skywork": skywork,
    "qwen-math-prm": qwen_math_prm,
    "math-psa": math_psa,
    "er-prm": er_prm,
    "versaprm": versaprm,
    "versaprm-qwen": versaprm,
    "pqm": pqm,
    "trl": trl,
    "trl-blank-line": trl_blank_line,
    "pure": pure,
    "llemma": llemma,
    "rebase": rebase,
    "reasoneval-7b": reasoneval_7b,
    "reasoneval-34b": reasoneval_34b,
}
