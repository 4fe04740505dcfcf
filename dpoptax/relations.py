"""A neighbouring relation, by name or as dp-accounting's enum, in; the enum out.

Two data sets are neighbours when they differ in one example, and the guarantee compares
neighbours. The relation says what "differ" means:

- `add_or_remove_one`: the example is there or it is not.
- `replace_one`: the example is exchanged for any other.
- `replace_special`: the example is exchanged for one that contributes nothing (zero-out).
"""

from typing import TypeAlias

from dp_accounting import NeighboringRelation

# One of the three names above, or the enum.
Relation: TypeAlias = str | NeighboringRelation


def parse_relation(relation: Relation) -> NeighboringRelation:
    """Returns dp-accounting's enum value for `relation`.

    Args:
        relation: `"add_or_remove_one"`, `"replace_one"`, `"replace_special"`, or the enum itself.

    Returns:
        `REPLACE_SPECIAL` and so on.

    Raises:
        ValueError: the name is none of the three.

    Example:
        >>> parse_relation("replace_one").name
        'REPLACE_ONE'
    """
    if isinstance(relation, NeighboringRelation):
        return relation
    names = {value.name.lower(): value for value in NeighboringRelation}
    if relation not in names:
        raise ValueError(f"relation must be one of {', '.join(sorted(names))}; got {relation!r}.")
    return names[relation]
