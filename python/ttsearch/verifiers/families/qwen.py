"""Qwen2.5-Math-PRM-{7B,72B} and Qwen2.5-Math-7B-PRM800K (Zhang et al. 2025, arXiv:2501.07301).

The checkpoint's tokenizer says which token `<extra_0>` is, and one that has none, or spells it in several, is refused. The
published id is 151651 (vLLM's step_tag_id for the class; <|quad_end|> in plain Qwen2.5). That is not verified on a real
tokenizer: PyPI has Qwen's vocabulary (dashscope), but no package was found with the tokens that Qwen2.5-Math-PRM adds to it,
so tests put them behind that vocabulary in their published order.
"""

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
        suffix_tokens=1,  # any id: see above
        max_length=4096,
        mix=(0, 1),
        architectures=("*ForProcessRewardModel",),
        by_name_only=False,
        source="Qwen/Qwen2.5-Math-PRM-7B, model card",
    ),
)
