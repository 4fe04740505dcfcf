"""Neighbouring relations: which data sets differ in one example.

Two data sets are neighbours when they differ in one example. A privacy guarantee compares the
releases of neighbours, and the relation says what "differ" means:

- `add_or_remove_one`: one data set has the example and the other does not.
- `replace_one`: another example takes its place.
- `replace_special`: an example that contributes nothing takes its place (zero-out).
"""

import enum
from typing import TYPE_CHECKING, TypeAlias

from dpoptax._validate import described

__all__ = ["parse_relation"]


def __dir__() -> list[str]:
    return __all__


# One of the three names above, or dp-accounting's enum.
if TYPE_CHECKING:
    import dp_accounting

    Relation: TypeAlias = str | dp_accounting.NeighboringRelation
else:
    # dp-accounting takes as long to import as JAX, so it is imported at its first use.
    Relation = str | enum.Enum


def parse_relation(relation: Relation) -> "dp_accounting.NeighboringRelation":
    """Returns a neighbouring relation as dp-accounting's enum.

    Args:
        relation: `"add_or_remove_one"`, `"replace_one"`, `"replace_special"`, or the enum itself.

    Returns:
        A `NeighboringRelation`.

    Raises:
        ValueError: the name is none of the three.

    Example:
        >>> parse_relation("replace_one").name
        'REPLACE_ONE'
    """
    from dp_accounting import NeighboringRelation

    if isinstance(relation, NeighboringRelation):
        return relation
    names = {value.name.lower(): value for value in NeighboringRelation}
    if not isinstance(relation, str) or relation not in names:
        raise ValueError(
            f"relation must be one of {', '.join(sorted(names))}; got "
            f"{described(relation)}. Leave it out for that of the sampler."
        )
    return names[relation]
