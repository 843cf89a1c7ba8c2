"""ReasonEval-{7B,34B} (Xia et al. 2024, arXiv:2404.05692): three labels; `mix=(0, 1, 0)` gives redundancy instead."""

from dataclasses import replace

from ..family import PrmFamily

LARGE = PrmFamily(
    name="reasoneval-34b",
    prompt="Question:\n{problem}\nAnswer:\nLet's think step by step.\n",
    tokenise="step",  # published: split by a special token, which is then dropped
    bos="required",
    mix=(0, 1, 1),  # validity: not negative
    architectures=("*34B*", "Llama*"),
    weight="score_head.weight",
    labels=3,
    by_name_only=False,
    source="GAIR-NLP/ReasonEval codes/examples.py",
)
FAMILIES = (
    # 7B: its separator is its bos token, which is dropped too and put back, so published positions are one too low
    replace(LARGE, name="reasoneval-7b", read_offset=-1, architectures=("*7B*", "Mistral*")),
    LARGE,
)
