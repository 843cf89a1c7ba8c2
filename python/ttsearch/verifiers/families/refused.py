"""PRMs that are known and not supported: (pattern of the name, why)."""

REFUSED = (
    (
        "*reasonflux-prm*",
        "its checkpoints load as a plain language model for some users (ReasonFlux issue 20), so what its published "
        "scores are could not be checked on real weights",
    ),
    ("*babelscape*prm*", "its scores come from remote code (pred_scalar) that could not be checked on real weights"),
    ("*llama-3.1-8b-prm800k-r*", "its scores come from remote code (pred_scalar) that could not be checked on real weights"),
)
