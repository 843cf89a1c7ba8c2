"""Math-psa of OpenR (Wang et al. 2024, arXiv:2410.09671): a LoRA adapter of Qwen2.5-Math-7B-Instruct."""

from ..family import PrmFamily

FAMILIES = (
    PrmFamily(
        name="math-psa",
        prompt="{problem} ",
        suffix=" \n\n\n\n\n",
        bos="tokenizer",
        suffix_tokens=1,
        vocab=151643,
        ids={" \n\n\n\n\n": 76325, " +": 488, " -": 481},
        rows=(" +", " -"),
        mix=(1, 0),
        known_as=("*math-psa*", "*math_psa*"),
        source="openr prm/infer_fns.py",
    ),
)
