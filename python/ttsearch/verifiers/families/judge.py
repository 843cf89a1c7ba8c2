"""A prompted judge: any chat model, asked after every step whether the solution so far is correct; P(yes) is the score.

To ask something else, copy this into a file of your own (docs/verifiers.md).
"""

from ..family import PrmFamily

FAMILIES = (
    PrmFamily(
        name="judge",
        layout="question",
        turns=(
            (
                "user",
                "Problem:\n{problem}\n\nSolution so far:\n{solution}\n\nThe solution may be unfinished. Is every step of "
                "it correct? Answer with Yes or No.",
            ),
        ),
        between="\n\n",
        answers=(("Yes", " Yes", "yes", " yes", "YES", " YES"), ("No", " No", "no", " no", "NO", " NO")),
        source="P(yes) of a prompted model, as in its own sampling at temperature 1, restricted to yes and no",
    ),
)
