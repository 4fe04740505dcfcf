"""Per-example gradients of a loss, in factored, stacked or microbatched form."""

from dpoptax.per_example._api import per_example_grads, value_and_per_example_grads
from dpoptax.per_example._base import PerExampleGrads
from dpoptax.per_example._explain import Explanation, explain
from dpoptax.per_example._stacked import StackedGrads, as_per_example_grads

__all__ = [
    "Explanation",
    "PerExampleGrads",
    "StackedGrads",
    "as_per_example_grads",
    "explain",
    "per_example_grads",
    "value_and_per_example_grads",
]
