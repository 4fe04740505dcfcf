"""Lower bound on epsilon: what an attack reached, at a confidence and under assumptions."""

import attrs

from dpoptax.reports._attack import as_percent
from dpoptax.reports._round import round_down


@attrs.frozen(kw_only=True)
class LowerBound:
    """A lower bound on epsilon that an attack reached. `Audit.lower_bound` makes it.

    Attributes:
        epsilon: the bound; 0 if the attack showed nothing.
        delta: the bound is on epsilon at this delta.
        confidence: the probability that a correct run has a bound that is not too large.
        method: "plan", "gaussian" or "epsilon_delta"; see `Audit.lower_bound`.
        assumptions: what the bound assumes, one sentence each.
        num_canaries: how many scores there are.
        num_guesses: for how many of them the attack guessed "in" or "out".
        num_correct: how many of these guesses are right.

    Example:
        >>> print(LowerBound(
        ...     epsilon=1.25, delta=1e-5, confidence=0.95, method="gaussian", assumptions=(),
        ...     num_canaries=100, num_guesses=90, num_correct=80,
        ... ))
        Epsilon is at least 1.250 at delta 1e-05 (95 % confidence): 80 of 90 guesses are right.
    """

    epsilon: float
    delta: float
    confidence: float
    method: str
    assumptions: tuple[str, ...]
    num_canaries: int
    num_guesses: int
    num_correct: int

    def __str__(self) -> str:
        guesses = f"{self.num_correct:,} of {self.num_guesses:,} guesses are right."
        head = f"({as_percent(self.confidence)} confidence): {guesses}"
        if self.epsilon == 0:
            text = f"No epsilon above 0 is shown at delta {self.delta:g} {head}"
        else:
            text = f"Epsilon is at least {round_down(self.epsilon)} at delta {self.delta:g} {head}"
        if self.assumptions:
            text += f" This assumes: {' '.join(self.assumptions)}"
        return text
