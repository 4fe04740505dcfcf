"""A run of a plan, one step at a time: sampler, transformation, ledger and keys in one object."""

import functools
import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import optax
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax._foreign_names import answer_foreign_names
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.random._keys import describe_key, root_key
from dpoptax.samplers import Batch, MaskedExamples
from dpoptax.training._automatic_axes import enter_automatic_axes
from dpoptax.training._data import (
    DeviceData,
    HostData,
    example_of_batch,
)
from dpoptax.training._dispatch import make_stepper
from dpoptax.training._fit import check_arguments, prepare
from dpoptax.training._multihost import from_first_process
from dpoptax.training._objective import Objective
from dpoptax.training._open_run import OpenRun
from dpoptax.training._own_gradients import Update, check_gradients, make_sampling_step
from dpoptax.training._program_digest import take_over_digest
from dpoptax.training._resume.run import INDEPENDENT_STEPS, open_run
from dpoptax.training._resume.settings import Checkpoints
from dpoptax.training._start import start_run
from dpoptax.training._train_step import StepInfo, TrainState


class PrivateRun(OpenRun):
    """A run of a plan in your own loop, one step at a time.

    The run draws the batches, clips, adds the noise of the plan, and charges each step before it
    runs. It makes no more steps than planned. It takes the arguments of `fit`, except `progress`,
    and gives the numbers of `fit`.

    You may stop early. `epsilon` counts the steps that ran so far. It is the cost of the run only
    if nothing that was released decided when to stop. If the private parameters decided it, for
    example by their validation accuracy, the cost is that of all planned steps. `report` states
    both.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(200, 20),
        ...     clip=1.0, noise_multiplier=1.0, num_steps=50, delta=1e-4,
        ... )
        >>> run = PrivateRun(
        ...     lambda mean, x: 0.5 * (mean - x) ** 2, jnp.array(0.0), jnp.ones(200),
        ...     plan=plan, optimizer=optax.sgd(0.1), key=jax.random.key(0),
        ... )
        >>> for info in run:
        ...     if run.steps_done == 40:
        ...         break
        >>> run.steps_left, run.epsilon() == plan.epsilon(40), abs(float(run.params) - 1) < 0.3
        (10, True, True)

    Gradients of your own take two calls in place of `step`:

        >>> run = PrivateRun(
        ...     None, jnp.array(0.0), jnp.ones(200), plan=plan, optimizer=optax.sgd(0.1),
        ... )
        >>> grads_fn = jax.jit(dpoptax.per_example_grads(lambda mean, x: 0.5 * (mean - x) ** 2))
        >>> while run.steps_left:
        ...     run.apply(grads_fn(run.params, run.sample()))
        >>> run.steps_done
        50
    """

    @answer_foreign_names
    def __init__(
        self,
        loss_fn: Callable[..., Float[Array, ""]] | Objective | None,
        params: PyTree,
        data: PyTree | DeviceData | HostData,
        *,
        plan: Plan,
        optimizer: optax.GradientTransformation,
        key: PRNGKeyArray | None = None,
        resume: str | os.PathLike[str] | Checkpoints | None = None,
        microbatch_size: int | None = None,
        diagnostics: bool = False,
    ) -> None:
        """Checks the arguments, and opens the folder of the run if there is one.

        Args:
            loss_fn: as in `fit`; or None, to compute the gradients yourself between `sample` and
                `apply`.
            params: as in `fit`.
            data: as in `fit`.
            plan: as in `fit`.
            optimizer: as in `fit`.
            key: as in `fit`. Without `loss_fn`, the noise is not bound to the gradients. So pass
                each key to one program only, or leave it out.
            resume: a folder, or `Checkpoints`, where the run is saved. If it holds a run, this one
                continues there, as in `fit`. Without `loss_fn`, the run cannot know whether its
                gradients are the same as before. So it continues with new noise, and steps that a
                crash lost stay charged.
            microbatch_size: as in `fit`.
            diagnostics: whether `step` also returns the clipped fraction and the median gradient
                norm. They are not private.

        Raises:
            TypeError: as in `fit`.
            ValueError: as in `fit`. All before the first step.
        """
        self._axes, params, data, key = enter_automatic_axes(params, data, key)
        with self._axes.context():
            self._open(
                *(loss_fn, params, data),
                plan=plan,
                optimizer=optimizer,
                key=key,
                resume=resume,
                microbatch_size=microbatch_size,
                diagnostics=diagnostics,
            )

    def _open(
        self,
        loss_fn: Callable[..., Float[Array, ""]] | Objective | None,
        params: PyTree,
        data: DeviceData | HostData,
        *,
        plan: Plan,
        optimizer: optax.GradientTransformation,
        key: PRNGKeyArray | None,
        resume: str | os.PathLike[str] | Checkpoints | None,
        **options: Any,
    ) -> None:
        root = root_key(key)
        make_step: Callable[..., Any]
        self._update: Update | None = None
        if loss_fn is None:
            check_arguments(data, params, plan, optimizer)
            if resume is not None and not isinstance(plan.sampler, INDEPENDENT_STEPS):
                raise ValueError(
                    "expected a sampler with independent steps, such as Poisson, for a run that is "
                    f"saved and has no loss; got {type(plan.sampler).__name__}, which ties the "
                    "steps of a run together. Pass the loss, or leave resume out."
                )
            example = example_of_batch(data, plan.sampler)
            tx, state = start_run(None, params, data, example, plan, optimizer, root)
            self._update = Update(tx, take_over_digest(None, tx))
            make_step = functools.partial(make_sampling_step, plan.sampler)
        else:
            state, make_step = prepare(
                loss_fn,
                params,
                data,
                plan=plan,
                optimizer=optimizer,
                root=root,
                **options,
            )
        self._drawn: tuple[TrainState, tuple[Batch, PyTree]] | None = None
        stepper = make_stepper(
            make_step,
            data,
            sampler=plan.sampler,
            diagnostics=True,
            count_nonfinite=False,
            max_batches=1,
        )
        run = open_run(resume, plan, params, key, describe_key(key))
        if self._update is None:
            super().__init__(plan, run, stepper, state, stepper.fingerprint)
            return
        with warnings.catch_warnings():
            # That the program changed is no news here.
            warnings.filterwarnings("ignore", "the loss, the optimizer", RuntimeWarning)
            super().__init__(plan, run, stepper, state, _new_program)

    @property
    def state(self) -> TrainState:
        """All that a further step needs. It contains keys: do not publish it."""
        return cast(TrainState, self._axes.leaving(self._state))

    def __iter__(self) -> Iterator[StepInfo]:
        """Makes one step at a time, and yields its `StepInfo`, until all planned steps ran."""
        while self.steps_left:
            yield self.step()

    def step(self, num_steps: int = 1) -> StepInfo:
        """Makes steps. Several in one call are faster than one by one.

        Args:
            num_steps: how many.

        Returns:
            Diagnostics of the last of these steps. They are not private.

        Raises:
            ValueError: the plan has fewer steps left; or the run has no loss.
        """
        if self._update is not None:
            raise ValueError(
                "step needs a loss, and this run was made without one. Call sample and apply, or "
                "make the run with a loss."
            )
        end = self._charge(_validate.count("num_steps", num_steps))
        info = None
        while self._done < end:
            # Host data are read for a fixed number of steps at a time.
            size = self._stepper.steps_per_dispatch or num_steps
            with self._axes.context():
                state, info = self._stepper.advance(self._state, min(size, end - self._done))
            self._finish(state)
        assert info is not None
        return cast(StepInfo, self._axes.leaving(info))

    def sample(self) -> MaskedExamples:
        """Draws the next batch. Until `apply`, further calls return the same batch.

        Returns:
            The examples with a leading axis of max_batch_size, and their mask, for
            `per_example_grads`. They are not private.

        Raises:
            ValueError: all planned steps ran; or the run has a loss.
        """
        if self._update is None:
            raise ValueError(
                "sample is for gradients of your own, and this run has a loss. Call step, or make "
                "the run with None for the loss."
            )
        self._refuse_more_than_planned(1)
        if self._drawn is None:
            with self._axes.context():
                state, drawn = self._stepper.advance(self._state, 1)
            self._drawn = state, cast(Any, drawn)
        _, (batch, examples) = self._drawn
        return MaskedExamples(self._axes.leaving(examples), self._axes.leaving(batch.mask))

    def apply(self, grads: PyTree) -> None:
        """Makes a step with the gradients of the batch that `sample` drew.

        Args:
            grads: `PerExampleGrads`, or a tree of arrays with a leading axis of max_batch_size.
                Gradients of padded rows are left out, whatever they are.

        Raises:
            ValueError: no batch was drawn; the gradients do not fit the batch or the parameters; or
                other gradients were released with this key.
        """
        if self._update is None or self._drawn is None:
            raise ValueError(
                "apply takes the gradients of the batch that sample drew, once; got a call without "
                "such a batch. Call sample before each apply."
            )
        state, (batch, examples) = self._drawn
        grads = self._axes.entering(grads)
        with self._axes.context():
            check_gradients(grads, batch, state.params)
            self._charge(1)
            state = self._update(state, batch, examples, grads)
        # Before the run is saved, which may be interrupted: this batch is used up.
        self._drawn = None
        self._finish(state)


def _new_program(state: TrainState) -> str:
    """Returns another text in each process, so that none repeats steps of another."""
    del state
    return f"gradients of the caller {from_first_process(secrets.randbits(31))}"
