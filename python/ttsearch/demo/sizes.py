"""The three model sizes and the training budget of each. Head dimension is 64 everywhere."""

from dataclasses import dataclass

from .tokenizer import EOS_ID, PAD_ID, VOCABULARY


@dataclass(frozen=True)
class Recipe:
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    layers: int
    learning_rate: float
    batch_tokens: int = 2000  # about 22 problems
    warmup_updates: int = 100
    policy_updates: int = 6000  # upper limit; the policy stops where `policy_target` is reached
    policy_target: float = 0.50  # held-out solve rate at temperature 1, mean over levels
    trunk_updates: int = 2500
    error_rate: float = 0.12  # share of steps corrupted while the verifier's trunk trains
    rollout_problems: int = 1000
    rollouts_per_problem: int = 4
    verifier_extra_layers: int = 2  # on top of the trunk: room to compare what it would say with what is said
    verifier_learning_rate: float = 3e-4
    verifier_error_rate: float = 0.35  # of the fresh half of its batches; the other half is rollouts
    verifier_updates: int = 1200  # of the new layers alone
    finetune_learning_rate: float = 2e-4
    finetune_updates: int = 800  # of everything
    check_every: int = 50
    check_below_loss: float = (
        0.15  # of solution tokens; above it next to nothing is solved, so nothing is sampled
    )
    dev_per_level: int = 60
    report_per_level: int = 80
    report_samples: int = 16


RECIPES = {
    "small": Recipe(64, 2, 1, 192, 4, 3e-3),
    "base": Recipe(128, 4, 2, 384, 6, 2e-3),
    "large": Recipe(192, 6, 2, 384, 4, 1.5e-3, policy_target=0.65),
}


def llama_config(recipe: Recipe, extra_layers: int = 0, **extra):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=recipe.hidden,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=64,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers + extra_layers,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=None,
        **extra,
    )
