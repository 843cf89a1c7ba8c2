"""ThinkPRM and GenPRM in plain transformers at temperature 0: one text at a time, every token with the whole prefix.

Written from mukhal/ThinkPRM and RyanLiu112/GenPRM, not from ttsearch. A draft that does not end gives None.
"""

from __future__ import annotations

import re

import torch


class PlainWriter:
    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids])).logits[0, -1].double()

    def write(self, ids: list[int], stops: list[str], room: int) -> tuple[list[int], str] | None:
        """Greedy ids up to a stop (its last token included), and the stop, "" for the end of text."""
        new: list[int] = []
        while len(new) < room:
            new.append(int(self.logits(ids + new).argmax()))
            text = self.text(new)
            found = [(text.index(stop), stop) for stop in stops if stop in text]
            if found:
                return new, min(found)[1]
            if new[-1] == self.tokenizer.eos_token_id:
                return new[:-1], ""
        return None

    def upto(self, ids: list[int], length: int) -> tuple[list[int], str]:
        """The first `length` characters of ids' text: whole tokens, and the rest as text."""
        kept = max(k for k in range(len(ids) + 1) if len(self.text(ids[:k])) <= length)
        return ids[:kept], self.text(ids)[len(self.text(ids[:kept])) : length]

    def probability(self, ids: list[int], rest: str, choices: tuple[str, str], temperature: float = 1.0) -> float:
        good, bad = (ids + self.tokens(rest + choice) for choice in choices)
        assert good[:-1] == bad[:-1]
        logprobs = self.logits(good[:-1]).log_softmax(-1)[[good[-1], bad[-1]]]
        return float((logprobs / temperature).softmax(-1)[0])


def thinkprm(writer: PlainWriter, problem: str, steps: list[str], room: int, temperature: float) -> float | None:
    solution = "\n".join(f"Step {i + 1}: {re.sub(r'Step [0-9]+:', '', step).strip()}" for i, step in enumerate(steps))
    turn = (
        f"You are given a math problem and a proposed step-by-step solution:\n\n[Math Problem]\n\n{problem}\n\n[Solution]"
        f"\n\n{solution}\n\nReview and critique each step in the proposed solution to determine whether each step is "
        "correct. If the solution is incomplete, only verify the provided steps."
    )
    prompt = writer.tokenizer.apply_chat_template(
        [{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True
    )
    ids = writer.tokens(prompt + "\nLet's verify step by step:")
    stops = ["Is the solution correct?", "</think>", f"Step {len(steps) + 1}:"]
    written = writer.write(ids, stops, room)
    if written is None:
        return None
    new, stop = written
    text = writer.text(new)
    kept, rest = writer.upto(new, text.index(stop) if stop else len(text))
    return writer.probability(ids + kept, rest + "\nIs the solution correct? ", ("yes", "no"), temperature)


def genprm(writer: PlainWriter, problem: str, steps: list[str], room: int, verify: bool) -> list[float | None]:
    """A turn that fails leaves an empty answer in the chat."""
    system = "You are a math teacher. Your task is to review and critique the paragraphs in solution step by step."
    chat = [{"role": "system", "content": system}]
    scores: list[float | None] = []
    for number, step in enumerate(steps, 1):
        chat.append({"role": "user", "content": f"{problem}\n{step}" if number == 1 else step})
        prompt = writer.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        answer, score = one_turn(writer, prompt, number, room, verify)
        scores.append(score)
        chat.append({"role": "assistant", "content": answer})
    return scores


def one_turn(writer: PlainWriter, prompt: str, number: int, room: int, verify: bool) -> tuple[str, float | None]:
    answer = f"<analyze>\nLet's analyze the Paragraph {number} step by step: "
    first = writer.write(writer.tokens(prompt + answer), ["</analyze>\n"], room)
    if first is None or not first[1]:
        return "", None
    answer += writer.text(first[0])
    if verify:
        answer += "<verify>\nLet's use python code to find any potential error:\n```python\n"
    else:
        answer += "<output>\n**Judgement**: $\\boxed"
    ids = writer.tokens(prompt + answer)
    second = writer.write(ids, ["</output>\n"], room - len(first[0]))
    if second is None:
        return "", None
    text = writer.text(second[0])
    boxes = list(re.finditer(r"(Yes|No)\}", text))
    if not boxes:
        return "", None
    kept, rest = writer.upto(second[0], boxes[-1].start())
    return answer + text, writer.probability(ids + kept, rest, ("Yes", "No"))
