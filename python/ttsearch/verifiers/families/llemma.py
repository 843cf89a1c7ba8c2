"""Llemma PRMs (Sun et al. 2024, arXiv:2403.09472) and their use by REBASE (Wu et al. 2024, arXiv:2408.00724)."""

from dataclasses import replace

from ..family import PrmFamily

LLEMMA = PrmFamily(
    name="llemma",
    prompt="# Question\n\n{problem}\n\n# Solution\n\n",
    suffix="\n\n",
    bos="tokenizer",
    suffix_tokens=2,
    read_offset=-1,  # the first of the two newlines
    vocab_mean=True,
    squash="sigmoid",
    mix=(1,),
    known_as=("*llemma*prm*",),
    source="ScalableMath/llemma-7b-prm-*; PRMBench mr_eval/models/llemma7b_prm.py",
)
FAMILIES = (
    LLEMMA,
    replace(
        LLEMMA,
        name="rebase",
        prompt="{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.\n",
        suffix="\n ки",
        between=" ",
        suffix_tokens=1,
        read_offset=0,
        known_as=("*[/_-]rebase[/_-]*",),
        source="thu-wyz/inference_scaling hf_score.py",
    ),
)
