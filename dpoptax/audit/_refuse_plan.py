"""Refusal of plans whose canaries would have no guarantee, or another one than the plan's."""

from dp_accounting import NeighboringRelation

from dpoptax._plan import Plan
from dpoptax.relations import parse_relation


def refuse_plan(plan: Plan) -> None:
    """Raises unless one canary, in or out, is a pair of neighbours of the plan."""
    sampler = plan.sampler
    if sampler.unit != "example":
        raise ValueError(
            f"canaries are single examples, and {type(sampler).__name__} draws {sampler.unit}s; "
            f"got a plan that protects {sampler.unit}s. Audit a plan with a sampler of examples, "
            "such as samplers.Poisson."
        )
    if parse_relation(sampler.relation) == NeighboringRelation.REPLACE_ONE:
        raise ValueError(
            "a canary that is out contributes nothing, which is not a pair of neighbours under "
            f"replace_one; got {type(sampler).__name__}, whose guarantee is for replace_one. Audit "
            "a plan whose sampler has a guarantee for add_or_remove_one or replace_special."
        )


def as_count(count: int, kind: str) -> str:
    """Returns how many canaries there are, in words."""
    return f"{count:,} {kind} {'canary' if count == 1 else 'canaries'}"
