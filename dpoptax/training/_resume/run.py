"""Resumable runs: when to save, where to continue, and which steps a crash has cost.

`fit` talks to a `ResumableRun`, or to a `NoResume` that does nothing. The order of the calls makes
the count right after a crash at any moment:

1. `restore` returns the last checkpoint.
2. `begin` compares the program, the data and the machine with those of the run so far. If they are
   equal, the run continues with the same keys, and steps after the checkpoint are replayed bit for
   bit. If not, it derives new keys, and those steps are lost.
3. `authorized` and `lost_steps` tell the ledger what is charged already.
4. `authorize` writes to the log before each dispatch. Then the steps run, then `save_if_due` may
   write a checkpoint. A crash in between loses work, never a charge.

`write_ahead_log.py` explains why these charges are enough.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpoptax import _validate, samplers
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.mechanisms._state import PastKeys
from dpoptax.random._derive import derive_key
from dpoptax.training._check_arguments import check_folder
from dpoptax.training._multihost import any_process, barrier
from dpoptax.training._resume.base import Folder
from dpoptax.training._resume.identity import identity_of
from dpoptax.training._resume.settings import Checkpoints
from dpoptax.training._train_step import TrainState

# Samplers with independent steps. A run may continue with new keys after any of them. Other
# samplers spread one draw over several steps, and the accounting relies on that draw.
INDEPENDENT_STEPS = (
    samplers.Poisson,
    samplers.FixedSize,
    samplers.UserPoisson,
    samplers.UserExamplesPoisson,
)
CHANGED = (
    "the loss, the optimizer, the data, the devices or JAX changed since the checkpoint{}, or a "
    "GPU runs without XLA_FLAGS=--xla_gpu_deterministic_ops=true"
)


class NoResume:
    """A run that is not saved."""

    authorized = 0

    def __init__(self, prng: str) -> None:
        self.prng = prng

    def restore(self, state: TrainState, plan: Plan) -> TrainState:
        """Returns the initial state."""
        del plan
        return state

    def begin(
        self, state: TrainState, fingerprint: Callable[[TrainState], str], plan: Plan
    ) -> TrainState:
        """Returns the state; computes no fingerprint, which would hash all data."""
        del fingerprint, plan
        return state

    def lost_steps(self, done: int | None = None) -> Iterator[tuple[int, int]]:
        """Yields nothing: no earlier process made steps."""
        del done
        return iter(())

    def authorize(self, end: int) -> None:
        """Does nothing."""

    def save_if_due(self, state: TrainState) -> None:
        """Does nothing."""

    def save(self, state: TrainState) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class ResumableRun:
    """A run in a folder, from the first look into it to the last checkpoint."""

    def __init__(self, folder: Folder, *, every_seconds: float, prng: str) -> None:
        self.prng: str = prng
        self._folder = folder
        self._every_seconds = every_seconds
        self._segment: int | None = None
        self._saved_step: int | None = None
        self._saved_at = time.monotonic()

    def restore(self, state: TrainState, plan: Plan) -> TrainState:
        """Returns the last saved state, or the initial one if the folder is new."""
        if jax.process_count() > 1:
            state = _on_all_processes(state)
        restored = self._folder.restore(state)
        segments = self._folder.log.segments
        if restored is None:
            # The first checkpoint is written before the first step is authorized.
            if any(segment.end > segment.first for segment in segments):
                raise ValueError(
                    "the folder's write-ahead log says that steps ran, and there is no checkpoint. "
                    "Start again in another folder with another key, and count this run in full."
                )
            return state
        if restored.step > plan.num_steps:
            raise ValueError(
                f"this run has made {restored.step} steps and the plan has {plan.num_steps}. "
                "Plan at least that many: they were released."
            )
        # Every step of a checkpoint was authorized first, so a log that knows less is not its log.
        if restored.segment >= len(segments) or restored.step > segments[restored.segment].end:
            raise ValueError(
                "the folder's write-ahead log is gone, or older than the checkpoint, so it is "
                "unknown which steps ran after it. Start again in another folder, and count this "
                "run in full."
            )
        self.prng, self._segment = restored.prng, restored.segment
        self._saved_step = restored.step
        return restored.state

    def begin(
        self, state: TrainState, fingerprint: Callable[[TrainState], str], plan: Plan
    ) -> TrainState:
        """Continues from the state of `restore`; returns it with the keys of its segment."""
        log, done, before = self._folder.log, int(state.step), self._segment
        program = fingerprint(state)
        replays = before is not None and log.continues(program, done)
        if before is not None and not replays and not isinstance(plan.sampler, INDEPENDENT_STEPS):
            raise ValueError(
                f"{CHANGED.format('')}, and {type(plan.sampler).__name__} ties the steps of a run "
                "together, so they cannot be drawn again. Undo the change, or start again in "
                "another folder, and count this run in full."
            )
        if not replays:
            log.begin_segment(program, done)
        self._segment = len(log.segments) - 1
        if before is not None and before != self._segment:
            # The checkpoint is of an older segment. Its keys belong to another program, so derive
            # new ones, also if this segment began before and only its checkpoint was lost.
            if not replays:
                self._warn_changed(done)
            state = _rekeyed(state, f"segment {self._segment} {program}")
        if self._saved_step is None:
            # Without a first checkpoint a crash could never replay the first steps.
            self.save(state)
            if self._saved_step is None:
                raise OSError("the first checkpoint could not be written; nothing was run.")
        return state

    @property
    def authorized(self) -> int:
        """Number of steps authorized so far, including steps that will be replayed."""
        return self._folder.log.segments[-1].end

    def lost_steps(self, done: int | None = None) -> Iterator[tuple[int, int]]:
        """Yields step ranges that may have been released but were lost in a crash.

        They stay charged. `done` is the number of steps of this run; by default all authorized.
        """
        yield from self._folder.log.lost_steps(self.authorized if done is None else done)

    def authorize(self, end: int) -> None:
        """Records on disk that the steps before `end` may be released; must precede them."""
        self._folder.log.authorize(end)

    def save_if_due(self, state: TrainState) -> None:
        """Saves the state if the last checkpoint is old enough."""
        if any_process(time.monotonic() - self._saved_at >= self._every_seconds):
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Saves the state, unless this step is saved already."""
        assert self._segment is not None
        step = int(state.step)
        if step != self._saved_step and self._folder.save(
            step, state, segment=self._segment, prng=self.prng
        ):
            self._saved_step = step
        self._saved_at = time.monotonic()

    def close(self) -> None:
        """Frees the folder."""
        self._folder.close()

    def _warn_changed(self, done: int) -> None:
        lost = sum(end - first for first, end in self.lost_steps(done))
        warnings.warn(
            f"{CHANGED.format(f' of step {done}')}: training continues with other noise, and "
            f"{lost} steps that ran after it stay charged. They count in epsilon, and are not "
            "repeated.",
            RuntimeWarning,
            stacklevel=6,
        )


def open_run(
    resume: str | os.PathLike[str] | Checkpoints | None,
    plan: Plan,
    params: PyTree,
    key: Any,
    prng: str,
) -> ResumableRun | NoResume:
    """Opens the folder of a run; `key` is the caller's, `prng` describes it."""
    if resume is None:
        return NoResume(prng)
    from dpoptax.training._resume.checkpoints import RunFolder  # imports Orbax

    if not isinstance(resume, Checkpoints):
        check_folder("resume", resume)
        resume = Checkpoints(resume)
    folder = RunFolder(resume, identity_of(plan, params, key))
    barrier("the log is read")  # before the first process writes to it
    return ResumableRun(folder, every_seconds=resume.every_seconds, prng=prng)


def _on_all_processes(state: PyTree) -> PyTree:
    """Replicates arrays of one process over all, as Orbax needs them."""
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec())

    def replicate(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        if not leaf.is_fully_addressable:
            return leaf
        if _validate.is_key(leaf):
            data = replicate(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        here = np.asarray(leaf)
        return jax.make_array_from_callback(here.shape, everywhere, lambda index: here[index])

    return jax.tree.map(replicate, state)


def _rekeyed(state: PyTree, domain: str) -> PyTree:
    """Replaces every key in a state by one derived from it, but not the keys of past steps.

    The noise of a step may depend on the noise of steps before it. What these were must not change.
    """

    def rekey(leaf: Any) -> Any:
        if isinstance(leaf, PastKeys) or not _validate.is_key(leaf):
            return leaf
        flat = [derive_key(key, domain) for key in leaf.reshape(-1)]
        return jnp.stack(flat).reshape(leaf.shape)

    return jax.tree.map(rekey, state, is_leaf=lambda node: isinstance(node, PastKeys))
