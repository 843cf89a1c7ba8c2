"""Skywork-o1-Open-PRM-Qwen-2.5-{1.5B,7B}: a value head on every line."""

from ..family import PrmFamily

FAMILIES = (
    PrmFamily(
        name="skywork",
        prompt="{problem}\n",
        suffix="\n",
        lines="join",
        tokenise="step",
        bos="required",
        suffix_tokens=1,
        max_length=4096,
        vocab=151643,
        ids={"\n": 198},
        squash="sigmoid",
        mix=(1,),
        architectures=("*ForPrmModel", "*PRM_MODEL", "*ForCausalLM"),
        weight="v_head.summary.weight",
        known_as=("*skywork*prm*",),
        by_name_only=False,
        source="skywork-o1-prm-inference model_utils/io_utils.py; newlines in a step made spaces as in compute-optimal-tts",
    ),
)
