"""Two more layers on top of a trunk that can do the task, so that it can judge a step instead of writing it.

A judge compares what the trunk would have said with what is said. The trunk's prediction of a token sits one
position before it, so the first new layer starts with one attention head that looks back by one token and
carries the prediction over, and with an MLP that weighs it against the token said. Plain zero-initialised
layers, on a stream not rescaled, had not found this after 1,350 updates (README.md).
"""

import math

import torch

from .batches import Batch
from .tokenizer import PAD_ID

RESIDUAL_SCALE = (
    1 / 8
)  # the trunk's stream has an RMS of about 50, against which new layers would not be heard
POSITION_PAIRS = (
    5  # fastest rotary pairs, which tell neighbouring positions apart, and as many of the slowest
)
RIDGE = 1e-6
GATE_GAIN = 8.0
LOOK_BACK_GAIN = 11.0  # one token back wins over its neighbours by about 15 nats


@torch.no_grad()
def grow(trunk, grown, batch: Batch) -> None:
    """Fill `grown`, the trunk's class with more layers; `batch` shows what the trunk's states look like."""
    old_layers = trunk.config.num_hidden_layers
    grown.load_state_dict(trunk.state_dict(), strict=False)
    grown.model.embed_tokens.weight.mul_(RESIDUAL_SCALE)
    grown.model.norm.weight.div_(RESIDUAL_SCALE)  # keeps the logits through the tied embedding
    grown.score.weight.mul_(RESIDUAL_SCALE)
    for layer in grown.model.layers[:old_layers]:
        layer.self_attn.o_proj.weight.mul_(RESIDUAL_SCALE)
        layer.mlp.down_proj.weight.mul_(RESIDUAL_SCALE)
    for layer in grown.model.layers[old_layers:]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    new = grown.model.layers[old_layers]
    real = (batch.ids != PAD_ID).flatten()
    constant = fit(normalised_input(trunk, trunk.model.norm, batch)[real], torch.ones(int(real.sum()), 1))[0]
    carry_predictions_forward(grown, new.self_attn, constant)
    weigh_said_token(trunk, grown, new, batch, real)


def normalised_input(model, module, batch: Batch) -> torch.Tensor:
    """What `module` (a norm) receives, divided by its RMS: [positions, hidden]."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    model.model(input_ids=batch.ids, use_cache=False)
    hook.remove()
    stream = seen[0].flatten(0, 1)
    return stream / stream.pow(2).mean(-1, keepdim=True).sqrt()


def fit(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Rows of weights whose products with `inputs` are closest to `targets` (ridge regression)."""
    gram = inputs.T @ inputs / len(inputs) + RIDGE * torch.eye(inputs.shape[1])
    return torch.linalg.solve(gram, inputs.T @ targets / len(inputs)).T


def carry_predictions_forward(model, attention, constant: torch.Tensor) -> None:
    """Head 0 looks one token back and writes the next-token logits found there into the stream."""
    dim, half = model.config.head_dim, model.config.head_dim // 2
    pairs, fast = torch.arange(half), slice(0, POSITION_PAIRS)
    angles = model.config.rope_parameters["rope_theta"] ** (-pairs / half)
    # The fast pairs agree one token back; the slow ones lower all scores alike: only that one is positive.
    amount = torch.zeros(half)
    amount[fast] = 1.0
    amount[-POSITION_PAIRS:] = 0.6 / POSITION_PAIRS - 1.0
    query, key = torch.zeros(dim), torch.zeros(dim)
    query[:half] = LOOK_BACK_GAIN * (amount != 0)
    key[:half] = LOOK_BACK_GAIN * amount * angles.cos()
    key[half:] = LOOK_BACK_GAIN * amount * angles.sin()
    attention.q_proj.weight[:dim] = query[:, None] * constant
    attention.k_proj.weight[:dim] = key[:, None] * constant

    vocabulary = model.model.embed_tokens.weight * model.model.norm.weight  # logits of a normalised stream
    if len(vocabulary) > dim:
        raise ValueError(f"the vocabulary must fit into one head of {dim}, got {len(vocabulary)} tokens")
    attention.v_proj.weight[:dim] = 0
    attention.v_proj.weight[: len(vocabulary)] = vocabulary - vocabulary.mean(0)
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(model.config.hidden_size, dim, generator=generator))[0]
    attention.o_proj.weight[:, :dim] = basis * math.sqrt(2)


def weigh_said_token(trunk, grown, layer, batch: Batch, real: torch.Tensor) -> None:
    """The layer's MLP picks, of the logits carried over, that of the token said, and writes it down."""
    inputs = normalised_input(grown, layer.post_attention_layernorm, batch)
    tokens = trunk.config.vocab_size
    said = torch.nn.functional.one_hot(batch.ids.flatten(), tokens).float()
    hidden = trunk.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    logits = hidden @ trunk.model.embed_tokens.weight.T
    predicted = torch.cat((logits[:, :1] * 0, logits[:, :-1]), dim=1).flatten(0, 1)
    predicted = predicted - predicted.mean(-1, keepdim=True)
    gate = fit(inputs[real], GATE_GAIN * (said[real] - 0.5))
    layer.mlp.gate_proj.weight[:tokens] = gate
    layer.mlp.up_proj.weight[:tokens] = fit(inputs[real], predicted[real])
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(grown.config.hidden_size, 1, generator=generator)
    layer.mlp.down_proj.weight[:, :tokens] = direction / direction.norm()
