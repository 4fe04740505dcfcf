"""The variables of a Keras model and its optimizer, as copies of the state of a run."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from dpoptax.training import PrivateRun


class KerasState:
    """Writes the state of a run to a Keras model, and sees if a callback changed it."""

    def __init__(self, model: Any, names: list[str], run: PrivateRun) -> None:
        self.run = run
        self._model, self._names = model, names
        self._variables = self._present()
        self._values: list[Any] = []
        self._copies: list[Any] = []

    def write(self) -> None:
        """Writes the weights and the state of the optimizer."""
        _, of_optimizer = self.run.state.opt_state
        self._values = [*(self.run.params[name] for name in self._names), *of_optimizer]
        # Keras donates the arrays of its variables when it evaluates, so it gets copies.
        self._copies = [jnp.copy(value) for value in self._values]
        for variable, copy in zip(self._variables, self._copies, strict=True):
            variable.assign(copy)

    def check(self) -> None:
        """Raises if a value is not the one that was written last.

        Raises:
            ValueError: a callback changed it. The run would go on without the change.
        """
        changed = None
        if list(map(id, self._present())) != list(map(id, self._variables)):
            changed = "the list of variables"
        else:
            for variable, value, copy in zip(
                self._variables, self._values, self._copies, strict=True
            ):
                # Evaluation makes new arrays with the same numbers.
                if variable.value is not copy and not np.array_equal(variable.value, value):
                    changed = variable.path
        if changed:
            raise ValueError(
                f"expected callbacks that leave weights and optimizer alone; got one that changed "
                f"{changed}. For a learning rate that changes, pass a "
                "keras.optimizers.schedules.LearningRateSchedule to the optimizer. To continue a "
                "run, use make_private(..., resume=folder)."
            )

    def _present(self) -> list[Any]:
        return [*self._model.trainable_variables, *self._model.optimizer.variables]
