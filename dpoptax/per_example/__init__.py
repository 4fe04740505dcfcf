"""Stage 2, a loss in, the gradients of each example out."""

from dpoptax.per_example.explanation import Explanation as Explanation
from dpoptax.per_example.explanation import explain as explain
from dpoptax.per_example.form import PerExampleGrads as PerExampleGrads
from dpoptax.per_example.gradients import per_example_grads as per_example_grads
from dpoptax.per_example.gradients import (
    value_and_per_example_grads as value_and_per_example_grads,
)
from dpoptax.per_example.stacked import StackedGrads as StackedGrads
from dpoptax.per_example.stacked import as_per_example_grads as as_per_example_grads
