"""Math-Shepherd (Wang et al. 2023, arXiv:2312.08935) and MathMinos (Gao et al. 2024, arXiv:2406.14024): Mistral."""

from ..family import PrmFamily

FAMILIES = (
    PrmFamily(
        name="math-shepherd",
        prompt="{problem} ",
        suffix=" ки",
        between="\n",
        bos="tokenizer",
        suffix_tokens=1,
        vocab=32000,
        ids={"ки": 12902, "+": 648, "-": 387},
        rows=("+", "-"),
        mix=(1, 0),
        known_as=("*math-shepherd*",),
        source="peiyi9979/math-shepherd-mistral-7b-prm, model card; openr prm/infer_fns.py",
    ),
    PrmFamily(
        name="mathminos",
        prompt="Human: {problem}\n\nAssistant:",
        step="Step {n}: {step}",
        suffix=" и",
        between="\n",
        bos="tokenizer",
        suffix_tokens=1,
        vocab=32000,
        ids={"и": 839},
        squash="none",
        mix=(1,),
        unbounded=True,
        architectures=("*ForTokenClassification",),
        labels=1,
        known_as=("*mathminos*", "*[/_-]minos[/_-]*",),
        source="PRMBench mr_eval/models/mathminos_mistral.py",
    ),
)
