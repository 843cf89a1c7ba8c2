"""PQM (Li and Li 2024, arXiv:2410.11287): a value head at an added token [PRM]; scores are any real number."""

from ..family import PrmFamily

FAMILIES = (
    PrmFamily(
        name="pqm",
        prompt=(
            "Below is an instruction that describes a task.\nWrite a response that appropriately completes the request.\n\n"
            "### Instruction:\n{problem}\n\n### Response: Let's think step by step\n"
        ),
        step="Step {n}: {step}",
        suffix=" [PRM]",
        between="\n",
        suffix_tokens=1,
        squash="none",
        mix=(1,),
        unbounded=True,
        architectures=("*ForCausalLM", ""),  # published without a config.json
        weight="v_head.summary.weight",
        token="[PRM]",
        known_as=("*pqm*",),
        by_name_only=False,
        source="Process_Q_Model train_main.py and bon_eval_hf.py",
    ),
)
