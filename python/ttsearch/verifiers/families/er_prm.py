"""ER-PRM (Zhang et al. 2024, arXiv:2412.11006): HanningZhang/Llama3.1-Math-PRM."""

from ..family import PrmFamily

FAMILIES = (
    PrmFamily(
        name="er-prm",
        prompt="{problem} ",
        suffix=" ки",
        bos="tokenizer",
        suffix_tokens=1,
        vocab=128000,
        ids={" ки": 116624, " +": 489, " -": 482},
        rows=(" +", " -"),
        mix=(1, 0),
        known_as=("*llama3.1-math-prm*", "*[/_-]er-prm[/_-]*"),
        source="ER-PRM evaluation/evaluate_gsm_reward_model.py; compute-optimal-tts rm_call.py",
    ),
)
