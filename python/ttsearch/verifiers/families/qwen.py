"""Qwen2.5-Math-PRM-{7B,72B} and Qwen2.5-Math-7B-PRM800K (Zhang et al. 2025, arXiv:2501.07301)."""

from ..family import PrmFamily

FAMILIES = (
    PrmFamily(
        name="qwen-math-prm",
        layout="chat",
        turns=(
            ("system", "Please reason step by step, and put your final answer within \\boxed{}."),
            ("user", "{problem}"),
        ),
        suffix="<extra_0>",
        tokenise="step",  # <extra_0> is a special token: the whole text gives the same ids
        suffix_tokens=1,
        max_length=4096,
        vocab=151643,
        ids={"<extra_0>": 151651},
        mix=(0, 1),
        architectures=("*ForProcessRewardModel",),
        by_name_only=False,
        source="Qwen/Qwen2.5-Math-PRM-7B, model card",
    ),
)
