"""A compiled Keras model with a private `fit`."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.accounting._epochs import num_steps_of
from dpoptax.keras._arguments import check_data, check_model, import_keras, refuse_arguments
from dpoptax.keras._loss import loss_of, parameters
from dpoptax.keras._optimizer import as_transformation, check_optimizer
from dpoptax.keras._variables import KerasState
from dpoptax.reports import Report
from dpoptax.training import PrivateRun
from dpoptax.training._resume.settings import Checkpoints


def make_private(
    model: Any,
    plan: Plan,
    *,
    key: PRNGKeyArray | None = None,
    microbatch_size: int | None = None,
    resume: str | os.PathLike[str] | Checkpoints | None = None,
) -> "PrivateModel":
    """Returns a compiled Keras model with a private `fit`.

    Its `fit(x, y)` makes all steps of the plan. Each batch is drawn by the sampler of the plan, and
    each example counts by the clipped gradient of the compiled loss. The optimizer of the model
    sees the private gradients only. The weights of `model` are updated in place. So evaluate,
    predict and save with `model` itself.

    Args:
        model: a compiled `keras.Model`, on the JAX backend, without layers that keep statistics of
            batches.
        plan: sampler, clip, noise, number of steps and delta.
        key: as in `dpoptax.training.fit`.
        microbatch_size: as in `dpoptax.training.fit`.
        resume: as in `dpoptax.training.fit`.

    Returns:
        An object with `fit(x, y, validation_data=, callbacks=, verbose=)`, `report()`, `epsilon()`
        and `model`.

    Raises:
        ImportError: Keras is not installed.
        TypeError: the model is no `keras.Model`. From `fit`: an argument that would change the
            batches, or data that are no arrays.
        ValueError: the backend is not JAX, or the model is not compiled, trains by a step of its
            own, or has an optimizer that averages or scales gradients. From `fit`: the model
            changes its state in training, or the data and the plan differ in size.

    Example:
        >>> private = make_private(model, plan)  # doctest: +SKIP
        >>> history = private.fit(x, y)  # doctest: +SKIP
        >>> print(private.report())  # doctest: +SKIP
    """
    check_model(model)
    check_optimizer(model.optimizer)
    return PrivateModel(model, plan, key=key, microbatch_size=microbatch_size, resume=resume)


class PrivateModel:
    """A Keras model and the plan of its private run; see `make_private`."""

    def __init__(self, model: Any, plan: Plan, **settings: Any) -> None:
        self.model: Any = model
        self.plan: Plan = plan
        self._settings = settings
        self._run: PrivateRun | None = None

    def fit(
        self,
        x: PyTree,
        y: PyTree = None,
        *,
        validation_data: Any = None,
        callbacks: Sequence[Any] | None = None,
        verbose: Any = "auto",
        **others: Any,
    ) -> Any:
        """Makes all steps of the plan.

        An epoch is the number of steps after which each example took part once on average. Losses
        and metrics of the training data are not computed, since they are not private. The logs hold
        `epsilon` of the steps so far, and the metrics of `validation_data`.

        Args:
            x: inputs: an array with one row per example, or a list or dict of such arrays.
            y: targets, in the same form; None if the loss needs none.
            validation_data: `(x, y)`, `(x, y, sample_weight)` or a data set, as in Keras. They
                must share no people with the training data.
            callbacks: of Keras. They see the logs above. One that sets `model.stop_training` ends
                the run. One that changes weights or the learning rate is refused.
            verbose: as in Keras: "auto", 0, 1 or 2.
            others: refused, with the remedy.

        Returns:
            The `keras.callbacks.History` of the run.

        Raises:
            TypeError: see `make_private`.
            ValueError: see `make_private`; or a second call of `fit`.
        """
        refuse_arguments(others)
        if self._run is not None:
            raise ValueError(
                "expected one call of fit for one plan; got a second one, whose steps the plan "
                "does not cover. Call make_private again with a plan for the new steps. The "
                "epsilons of both runs add up."
            )
        data = check_data(x, y)
        model = self.model
        check_model(model)
        check_optimizer(model.optimizer)
        _build(model, data)
        params, names = parameters(model)
        run = PrivateRun(
            loss_of(model, names),
            params,
            data,
            plan=self.plan,
            optimizer=as_transformation(model.optimizer, names),
            **self._settings,
        )
        self._run = run
        with run:
            return self._train(KerasState(model, names, run), validation_data, callbacks, verbose)

    def report(self) -> Report:
        """Returns the privacy statement of the steps that ran.

        Raises:
            ValueError: `fit` was not called.
        """
        return self._started().report()

    def epsilon(self, delta: float | None = None) -> float:
        """Returns the epsilon of the steps that ran.

        Raises:
            ValueError: `fit` was not called.
        """
        return self._started().epsilon(delta)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a private model has fit, report, epsilon, plan and model, but no {name}. Use the "
            f"Keras model for what is not training: private.model.{name}."
        )

    def __repr__(self) -> str:
        """Leaves out weights and keys."""
        return f"PrivateModel({self.model.name!r}, {self.plan!r})"

    def _started(self) -> PrivateRun:
        if self._run is None:
            raise ValueError(
                "expected a call of fit before; got none. For the epsilon of all planned steps, "
                "call plan.epsilon()."
            )
        return self._run

    def _train(self, state: KerasState, validation: Any, callbacks: Any, verbose: Any) -> Any:
        run, model = state.run, self.model
        steps = num_steps_of(self.plan.sampler, 1.0, None)
        history = import_keras().callbacks.CallbackList(
            callbacks,
            add_history=True,
            add_progbar=verbose != 0,
            verbose=verbose,
            epochs=-(-self.plan.num_steps // steps),
            steps=steps,
            model=model,
        )
        model.stop_training = False
        watched = bool(callbacks)
        state.write()
        history.on_train_begin()
        state.check()
        logs: dict[str, Any] = {}
        while run.steps_left and not model.stop_training:
            epoch, first = divmod(run.steps_done, steps)
            history.on_epoch_begin(epoch)
            state.check()
            for number in range(first, min(steps, first + run.steps_left)):
                history.on_train_batch_begin(number)
                run.step()
                if watched:
                    state.write()
                history.on_train_batch_end(number, {})
                if watched:
                    state.check()
                if model.stop_training:
                    break
            state.write()
            logs = {"epsilon": run.epsilon()} | self._validate(validation)
            history.on_epoch_end(epoch, logs)
            state.check()
        state.write()
        # With a moving average of the weights, Keras writes it to the model at the end.
        model.optimizer.finalize_variable_values(model.trainable_weights)
        history.on_train_end(logs)
        return model.history

    def _validate(self, data: Any) -> dict[str, float]:
        if data is None:
            return {}
        x, y, weight = (*data, None)[:3] if isinstance(data, tuple | list) else (data, None, None)
        found = self.model.evaluate(x, y, sample_weight=weight, verbose=0, return_dict=True)
        return {f"val_{name}": value for name, value in found.items()}


def _build(model: Any, data: PyTree) -> None:
    """Creates the variables of model, loss, metrics and optimizer, from the shapes of one row."""
    blank = jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape[1:]), leaf.dtype), data)
    model.test_on_batch(*blank)
    model.reset_metrics()
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
