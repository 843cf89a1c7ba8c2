"""Implicit PRMs (Yuan et al. 2024, arXiv:2412.01981), such as EurusPRM: a model against the one it was trained from."""

from ..family import PrmFamily

FAMILIES = (
    PrmFamily(
        name="implicit",
        layout="chat",
        turns=(("user", "{problem}"),),
        step="Step {n}: {step}",
        between="\n\n",
        read="every token",
        scale=0.001,
        unbounded=True,
        known_as=("*eurusprm*", "*eurus-prm*", "*implicitprm*", "*implicit-prm*"),
        source="PRIME-RL/ImplicitPRM eval/processbench.py: the answer so far as a whole turn",
    ),
)
