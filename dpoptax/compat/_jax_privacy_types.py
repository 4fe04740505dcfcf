"""What `clipped_grad` returns: the classes of JAX Privacy, or the same without JAX Privacy."""

import collections
import importlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import attrs

from dpoptax.relations import Relation, parse_relation

# The name and the fields of the tuple in JAX Privacy.
Aux = collections.namedtuple("Aux", ["values", "grad_norms", "aux"])


@runtime_checkable
class BoundedSensitivity(Protocol):
    """What both classes of the callable have in common.

    Attributes:
        l2_norm_bound: the bound on the L2 norm of what one example adds to the result.
        has_aux: whether the result is a pair, with a second part that is not private.
    """

    l2_norm_bound: Any
    has_aux: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the sum of a batch."""

    def sensitivity(self, neighboring_relation: Any = ...) -> Any:
        """Returns how far neighbouring data sets move the sum, in L2 norm."""


@attrs.frozen(eq=False)
class BoundedSensitivityCallable:
    """A function of a batch, and how far one example moves its result.

    Attributes:
        fun: the function.
        l2_norm_bound: the bound on the L2 norm of what one example adds to the result.
        has_aux: whether `fun` returns a pair. The second part is not private.
    """

    fun: Callable[..., Any]
    l2_norm_bound: Any
    has_aux: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self.fun(*args, **kwargs)

    def sensitivity(self, neighboring_relation: Relation = "replace_special") -> Any:
        """Returns how far neighbouring data sets move the result, in L2 norm.

        Args:
            neighboring_relation: see `dpoptax.relations`.
        """
        replaced = parse_relation(neighboring_relation).name == "REPLACE_ONE"
        return (2 if replaced else 1) * self.l2_norm_bound


def result_types() -> tuple[Any, Any]:
    """Returns the classes of the callable and of the auxiliary outputs."""
    try:
        clipping = importlib.import_module("jax_privacy.clipping")
    except ModuleNotFoundError as error:
        if error.name not in ("jax_privacy", "jax_privacy.clipping"):
            raise
        if error.name == "jax_privacy":
            return BoundedSensitivityCallable, Aux
        clipping = None
    found = [getattr(clipping, name, None) for name in _NAMES]
    if None in found:
        raise ImportError(
            "clipped_grad returns what that of JAX Privacy 2.0 returns; got an installed "
            f"jax_privacy without {' and '.join(_NAMES)} in jax_privacy.clipping. Install it by "
            "pip install 'jax-privacy==2.0.0', or uninstall it: dpoptax does not need it."
        )
    return found[0], found[1]


_NAMES = ("BoundedSensitivityCallable", "AuxiliaryOutput")
