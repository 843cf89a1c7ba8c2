"""Token classifiers trained with TRL's PRMTrainer, and PURE (Cheng et al. 2025, arXiv:2504.15275)."""

from dataclasses import replace

from ..family import PrmFamily

TRL = PrmFamily(
    name="trl",
    suffix="\n",
    tokenise="step",
    bos="if any",
    mix=(0, 1),
    architectures=("*ForTokenClassification",),
    labels=2,
    by_name_only=False,
    source="TRL PRMTrainer: two labels, LABEL_1 is good, read at the last separator token",
)
FAMILIES = (
    TRL,
    replace(
        TRL,
        name="trl-blank-line",
        suffix="\n\n",
        by_name_only=True,
        source="TRL PRMTrainer with step_separator='\\n\\n'; the demo verifier",
    ),
    replace(
        TRL,
        name="pure",
        suffix="\n\n",
        bos="never",
        mix=(-1, 1),
        unbounded=True,  # p1 - p0, from -1 to 1
        by_name_only=True,
        known_as=("*pure-prm*", "*pure_prm*"),
        source="jinachris/PURE-PRM-7B; PRMBench mr_eval/models/pure_prm.py",
    ),
)
