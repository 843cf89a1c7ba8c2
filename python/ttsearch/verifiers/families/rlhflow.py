"""RLHFlow (Xiong et al. 2024): a dialogue in which every step is answered "+"."""

from dataclasses import replace

from ..family import PrmFamily

MISTRAL_DATA = PrmFamily(
    name="rlhflow-mistral",
    layout="dialogue",
    turns=(("user", "{problem} {step}"),),
    next_turns=(("user", "{step}"),),
    reply="+",
    template_args={"date_string": "26 Jul 2024"},  # Llama 3.1's own default; without it some templates print today's date
    vocab=128000,
    ids={"+": 10, "-": 12},
    rows=("+", "-"),
    mix=(1, 0),
    known_as=("*llama3.1-8b-prm-mistral-data*",),
    source="RLHFlow/RLHF-Reward-Modeling math-rm/prm_evaluate.py",
)
FAMILIES = (MISTRAL_DATA, replace(MISTRAL_DATA, name="rlhflow-deepseek", known_as=("*llama3.1-8b-prm-deepseek-data*",)))
