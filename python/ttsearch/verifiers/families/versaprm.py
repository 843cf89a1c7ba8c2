"""VersaPRM (Zeng et al. 2025, arXiv:2502.06737), Llama-PRM800K and Qwen-PRM800K of its authors."""

from dataclasses import replace

from ..family import PrmFamily

LLAMA = PrmFamily(
    name="versaprm",
    prompt="{problem} \n\n",
    strip_problem=True,
    suffix=" \n\n\n\n",
    bos="tokenizer",
    suffix_tokens=1,
    vocab=128000,
    ids={" \n\n\n\n": 23535, "-": 12, "+": 10},
    rows=("-", "+"),
    mix=(0, 1),
    known_as=("*versaprm*", "*llama-prm800k*"),
    source="VersaPRM evaluation/prm_models/prm_llama.py, evaluation/get_rewards_reasoning_step.py",
)
QWEN = replace(
    LLAMA, name="versaprm-qwen", vocab=151643, ids={" \n\n\n\n": 22701, "-": 12, "+": 10}, known_as=("*qwen-prm800k*",)
)
FAMILIES = (LLAMA, QWEN)
