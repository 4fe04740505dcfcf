"""Lower bound on epsilon: what an attack reached, at a confidence and under an assumption."""

import attrs


@attrs.frozen(kw_only=True)
class LowerBound:
    """A lower bound on epsilon that an attack showed."""

    epsilon: float
    delta: float
    confidence: float
    method: str
    assumption: str
    num_guesses: int
    num_correct: int
