"""A running fit in, a run that can be taken up again out: when to save, and what a crash cost."""

import os
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from dpoptax import _validate, samplers
from dpoptax._plan import Plan
from dpoptax.random._derive import derive_key
from dpoptax.training._multihost import if_any, together
from dpoptax.training._resume.checkpoints import Checkpoints, RunFolder
from dpoptax.training._train_step import TrainState

# Samplers whose steps are independent, so that a run may go on under new keys after any of them.
INDEPENDENT = (samplers.Poisson, samplers.FixedSize, samplers.UserPoisson)


class Kept:
    """The run in a folder, from the first look into it to the last checkpoint."""

    def __init__(
        self,
        resume: str | os.PathLike[str] | Checkpoints,
        identity: dict[str, Any],
        generator: str,
    ) -> None:
        """Opens the folder.

        Args:
            resume: where, or where and how.
            identity: of the run, see `identity_of`.
            generator: of the keys of a new run, in words.
        """
        self._settings = resume if isinstance(resume, Checkpoints) else Checkpoints(resume)
        self._folder = RunFolder(self._settings, identity)
        together("the journal is read")  # before the first process writes to it
        self.generator = generator
        self._segment: int | None = None
        self._saved_step: int | None = None
        self._saved_at = time.monotonic()

    def restore(self, state: TrainState, plan: Plan) -> TrainState:
        """Returns the state that was saved last, or the one given if none was.

        Args:
            state: of a new run.
            plan: of the run.

        Returns:
            Where to begin.

        Raises:
            ValueError: the folder holds another run, or a longer one, or its journal is gone.
        """
        if jax.process_count() > 1:
            state = on_all_processes(state)
        restored = self._folder.restore(state)
        if restored is None:
            if any(segment.last > segment.first for segment in self._folder.journal.segments):
                raise ValueError(
                    "the folder's journal says that steps ran, and there is no checkpoint. Begin "
                    "anew in another folder, under another key, and count this run in full."
                )
            return state
        if restored.step > plan.num_steps:
            raise ValueError(
                f"this run has made {restored.step} steps and the plan has {plan.num_steps}. "
                "Plan that many at least: they were released."
            )
        segments = self._folder.journal.segments
        if restored.segment >= len(segments) or restored.step > segments[restored.segment].last:
            raise ValueError(
                "the folder's journal is gone, or older than the checkpoint, so nobody can tell "
                "which steps ran after it. Begin anew in another folder, and count this run in "
                "full."
            )
        self.generator, self._segment = restored.generator, restored.segment
        self._saved_step = restored.step
        return restored.state

    def enter(self, state: TrainState, program: str, plan: Plan) -> TrainState:
        """Goes on from `state` with a program; returns the state with the keys for it.

        Args:
            state: of `restore`.
            program: its digest.
            plan: of the run.

        Returns:
            The same state, under other keys if it goes on otherwise than it began.

        Raises:
            ValueError: it would go on otherwise, and the sampler's law does not allow it.
            OSError: the first checkpoint could not be written.
        """
        journal, done = self._folder.journal, int(state.step)
        began = self._segment
        alike = began is not None and journal.continues(program, done)
        if began is not None and not alike and not isinstance(plan.sampler, INDEPENDENT):
            raise ValueError(
                "the loss, the optimizer, the data, the devices or JAX changed since the "
                "checkpoint, or a GPU computes without XLA_FLAGS=--xla_gpu_deterministic_ops=true, "
                f"and {type(plan.sampler).__name__} ties the steps of a run together: "
                "they cannot be drawn anew. Go on as it began, or begin anew in another folder."
            )
        if not alike:
            journal.begin(program, done)
        self._segment = len(journal.segments) - 1
        if began is not None and began != self._segment:
            lost = sum(last - first for first, last in self.lost(done))
            if not alike:
                warnings.warn(
                    "the loss, the optimizer, the data, the devices or JAX changed since the "
                    f"checkpoint of step {done}, or a GPU computes without "
                    "XLA_FLAGS=--xla_gpu_deterministic_ops=true: training goes on with other "
                    f"noise, and {lost} steps that ran after it stay charged.",
                    RuntimeWarning,
                    stacklevel=3,
                )
            state = rekeyed(state, f"segment {self._segment} {program}")
        if self._saved_step is None:
            self.save(state)
            if self._saved_step is None:
                raise OSError("the first checkpoint could not be written; nothing was run.")
        return state

    def lost(self, done: int | None = None) -> Iterator[tuple[int, int]]:
        """Gives the steps that were let run and are no part of the run as it stands.

        Args:
            done: steps of the run as it stands; by default as many as it is to repeat alike.

        Yields:
            First step and the one behind the last.
        """
        journal = self._folder.journal
        yield from journal.lost(journal.segments[-1].last if done is None else done)

    @property
    def released(self) -> int:
        """How many steps of the run as it stands were let run, those to be repeated included."""
        return self._folder.journal.segments[-1].last

    def allow(self, steps: int) -> None:
        """Notes, before they run, that steps up to number `steps` may be released.

        Args:
            steps: how many in all.
        """
        self._folder.journal.allow(steps)

    def save_if_due(self, state: TrainState) -> None:
        """Saves if the last time is long enough ago.

        Args:
            state: after the steps that are done.
        """
        if if_any(time.monotonic() - self._saved_at >= self._settings.every_seconds):
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Saves, unless this step is saved.

        Args:
            state: after the steps that are done.
        """
        assert self._segment is not None
        step = int(state.step)
        if step != self._saved_step and self._folder.save(
            step, state, segment=self._segment, generator=self.generator
        ):
            self._saved_step = step
        self._saved_at = time.monotonic()

    def close(self) -> None:
        """Releases the folder."""
        self._folder.close()


def on_all_processes(state: PyTree) -> PyTree:
    """Returns a state whose every array is one of all processes, as a checkpoint needs them.

    Args:
        state: the same in every process where an array is of one alone.

    Returns:
        A tree like it.
    """
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec())

    def one(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        if not leaf.is_fully_addressable:
            return leaf
        if _validate.is_key(leaf):
            data = one(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        here = np.asarray(leaf)
        return jax.make_array_from_callback(here.shape, everywhere, lambda index: here[index])

    return jax.tree.map(one, state)


def rekeyed(state: PyTree, domain: str) -> PyTree:
    """Returns a state whose every key is another, derived from what it was.

    Args:
        state: a tree with keys among its leaves.
        domain: any text.

    Returns:
        A tree like it.
    """

    def one(leaf: Any) -> Any:
        if not _validate.is_key(leaf):
            return leaf
        flat = [derive_key(key, domain) for key in leaf.reshape(-1)]
        return jnp.stack(flat).reshape(leaf.shape)

    return jax.tree.map(one, state)
