"""Audit: the scores of an attack on a run, beside what the run guarantees."""

import pathlib
from typing import Literal, TypeAlias

import attrs
import numpy as np

from dpoptax._attacks._lower_bound import LowerBound
from dpoptax._plan import Plan

Method: TypeAlias = Literal["plan", "gaussian", "epsilon_delta"]


def _as_scores(scores: np.ndarray) -> np.ndarray:
    return np.asarray(scores, np.float64)


@attrs.frozen(kw_only=True, eq=False)
class Audit:
    """The scores of an attack on a run, beside what the run guarantees.

    Attributes:
        in_scores: one score for each canary that was in; float64, not private.
        out_scores: one score for each canary that was out.
        attack: what was done, in words.
        plan: the plan of the run.
        num_steps: how many steps were charged.
        independent: whether the scores are independent of each other.
    """

    in_scores: np.ndarray = attrs.field(converter=_as_scores, repr=False)
    out_scores: np.ndarray = attrs.field(converter=_as_scores, repr=False)
    attack: str
    plan: Plan
    num_steps: int
    independent: bool = False

    @classmethod
    def from_scores(
        cls,
        in_scores: np.ndarray,
        out_scores: np.ndarray,
        *,
        plan: Plan,
        num_steps: int | None = None,
        attack: str = "an attack",
        independent: bool = False,
    ) -> "Audit":
        """Returns the audit of a run.

        Args:
            in_scores: the attack's score of each canary that was in: larger means "in".
            out_scores: the same of each canary that was out. Whether a canary is in was decided by
                a fair coin of its own.
            plan: of the run. Its sampler counts the canaries among its examples.
            num_steps: how many steps were charged; all of the plan by default.
            attack: what was done, in words, such as "white-box gradient canaries".
            independent: True if each score comes from a run of its own, or if the canaries of one
                run do not influence each other's scores. Bounds are then tighter.
        """
        return cls(
            in_scores=in_scores,
            out_scores=out_scores,
            attack=attack,
            plan=plan,
            num_steps=plan.num_steps if num_steps is None else num_steps,
            independent=independent,
        )

    @property
    def epsilon(self) -> float:
        """The epsilon that the steps guarantee."""
        return self.plan.epsilon(self.num_steps)

    @property
    def delta(self) -> float:
        """The delta of the guarantee, and of the lower bounds."""
        return self.plan.delta

    def lower_bound(self, confidence: float = 0.95, method: Method = "plan") -> LowerBound:
        """Returns a lower bound on epsilon."""
        raise NotImplementedError

    def roc(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns false positive rates and true positive rates of all thresholds."""
        raise NotImplementedError

    def to_json(self) -> str:
        """Returns the audit as JSON. It holds scores, which are not private."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, text: str) -> "Audit":
        """Returns the audit that `to_json` wrote."""
        raise NotImplementedError

    def save_figure(self, path: str | pathlib.Path) -> None:
        """Draws the attack's ROC beside the trade-off curve of the guarantee."""
        raise NotImplementedError
