"""Per-example gradients of a loss, in factored, stacked or microbatched form."""

from dpoptax.per_example._api import per_example_grads, value_and_per_example_grads
from dpoptax.per_example._base import PerExampleGrads
from dpoptax.per_example._explain import explain
from dpoptax.per_example._views import average_views

__all__ = [
    "PerExampleGrads",
    "per_example_grads",
    "value_and_per_example_grads",
    "average_views",
    "explain",
]
