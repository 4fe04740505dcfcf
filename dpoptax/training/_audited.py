"""What a run needs from an audit: rows for its canaries, and a reading of each release.

The canaries of an audit are additional examples: the sampler draws them among all others. Each of
them is in by a fair coin. One that is out keeps its index, and is masked when it is drawn. So
neither the sampler nor the plan knows that there are canaries.

Coins, canaries and scores are part of the optimizer state. So they are saved with it, and the noise
is bound to them: two runs with one key and other coins share no noise.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dpoptax._attacks import Audit
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.per_example import PerExampleGrads
from dpoptax.per_example._base import select
from dpoptax.random import derive_key
from dpoptax.samplers import Batch
from dpoptax.training._data import DeviceData, HostData
from dpoptax.transforms._private import PrivateTransformation, stddev_of


class AuditState(NamedTuple):
    """The state of the private transformation, and what an audit keeps. Not private.

    Attributes:
        inner: the state of the transformation that the audit reads.
        step: how many releases were read.
        included: bool `(num_canaries,)`, the coins.
        canaries: a tree of arrays, from the audit.
        scores: `(num_canaries,)`, summed over the releases.
        independent: whether no canary has influenced the score of another one.
    """

    inner: Any
    step: Int[Array, ""]
    included: Bool[Array, " num_canaries"]
    canaries: PyTree
    scores: Float[Array, " num_canaries"]
    independent: Bool[Array, ""]

    def __repr__(self) -> str:
        """Leaves out coins and scores, which must not appear in logs and error messages."""
        return f"AuditState(step={self.step}, <coins and scores not shown>)"


class Seen(NamedTuple):
    """What an attack may see of one step.

    Attributes:
        release: a tree like the parameters.
        stddev: of the noise in each coordinate of the release; None if it is not known.
        params: before the step.
        grads: what the private transformation got, after it has summed them.
    """

    release: PyTree
    stddev: PyTree | None
    params: PyTree
    grads: Any


@runtime_checkable
class RunAudit(Protocol):
    """An audit of one run, made by `Canaries.start`.

    Attributes:
        data: of the run, with the rows of canaries that have rows, at the end.
        has_rows: whether the canaries are rows of the data.
        canaries: a tree of arrays, for the state.
        attack: what the attack sees, in words.
    """

    data: DeviceData | HostData
    has_rows: bool
    canaries: PyTree
    attack: str

    def insert(
        self, grads: PerExampleGrads, canaries: PyTree, slots: Int[Array, " batch"]
    ) -> PerExampleGrads:
        """Returns gradients in which row i is that of canary `slots[i]`, unless that is -1."""

    def score(
        self, canaries: PyTree, step: Int[Array, ""], seen: "Seen"
    ) -> Float[Array, " num_canaries"]:
        """Returns what a step adds to the score of each canary."""

    def is_independent(self, seen: "Seen") -> bool:
        """Whether canaries do not influence what a step adds to each other's scores."""

    def final_scores(self, state: AuditState, params: PyTree) -> Float[Array, " num_canaries"]:
        """Returns the scores after a run that ended with these parameters."""


@runtime_checkable
class Canaries(Protocol):
    """What `fit` takes as `audit`: a frozen value that starts an audit for each run."""

    @property
    def num_canaries(self) -> int:
        """How many canaries there are, in and out."""

    def start(
        self,
        loss_fn: Any,
        params: PyTree,
        data: DeviceData | HostData,
        plan: Plan,
        key: PRNGKeyArray,
    ) -> RunAudit:
        """Returns the audit of a run; raises if the run cannot be audited."""


class Started(NamedTuple):
    """An audit of a run, and its coins."""

    audit: RunAudit
    included: Bool[Array, " num_canaries"]


def start_audit(
    canaries: Canaries,
    loss_fn: Any,
    params: PyTree,
    data: DeviceData | HostData,
    plan: Plan,
    root: PRNGKeyArray,
) -> Started:
    """Returns the audit of a run, with a fair coin for each canary."""
    key = derive_key(root, "dpoptax audit")
    coins = jax.random.bernoulli(derive_key(key, "coins"), shape=(canaries.num_canaries,))
    audit = canaries.start(loss_fn, params, data, plan, derive_key(key, "canaries"))
    return Started(audit, coins)


def refuse_same_coins(coins: Bool[Array, " count *rest"]) -> None:
    """Raises if all canaries are in, or all are out, before a run is paid for."""
    if np.unique(np.asarray(coins)).size < 2:
        raise ValueError(
            "an audit compares canaries that are in with canaries that are out; got the same coin "
            f"for each of {len(coins):,}. Take some hundreds of canaries, or of runs."
        )


def audited(private: optax.GradientTransformation, started: Started) -> PrivateTransformation:
    """Returns the same transformation, whose releases are read by an audit."""
    audit, included = started

    def init(params: PyTree) -> AuditState:
        scores = jnp.zeros(included.shape, jnp.float32)
        step = jnp.zeros((), jnp.int32)
        return AuditState(
            private.init(params), step, included, audit.canaries, scores, jnp.ones((), bool)
        )

    def update(
        updates: Any, state: AuditState, params: Any = None, **extra_args: Any
    ) -> tuple[PyTree, AuditState]:
        del extra_args
        stddev = stddev_of(private, state.inner, params)
        release, inner = private.update(updates, state.inner, params)
        seen = Seen(release, stddev, params, updates)
        added = audit.score(state.canaries, state.step, seen)
        return release, state._replace(
            inner=inner,
            step=state.step + 1,
            scores=state.scores + added.astype(jnp.float32),
            independent=state.independent & audit.is_independent(seen),
        )

    def noise_stddev(state: AuditState, params: PyTree) -> PyTree:
        return stddev_of(private, state.inner, params)

    return PrivateTransformation(init, update, noise_stddev=noise_stddev)


def audit_state(opt_state: optax.OptState) -> AuditState:
    """Returns the state of the audit in the state of an optimizer."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, AuditState))
    found: AuditState = next(leaf for leaf in leaves if isinstance(leaf, AuditState))
    return found


def finish_audit(
    started: Started, plan: Plan, opt_state: optax.OptState, params: PyTree, num_steps: int
) -> Audit | None:
    """Returns the audit of a run that ended, of which `num_steps` steps are charged."""
    state = audit_state(opt_state)
    if not int(state.step):
        return None
    return audit_of_scores(
        started.audit.final_scores(state, params),
        state.included,
        plan=plan,
        num_steps=num_steps,
        attack=started.audit.attack,
        independent=bool(state.independent),
    )


def audit_of_scores(scores: Any, included: Any, *, attack: str, **options: Any) -> Audit:
    """Returns the audit of the scores of all canaries.

    A run that diverged may have scores that are nan. Its result must not be lost. So these scores
    become one number, whoever was in, and the text says so.
    """
    scores, included = np.asarray(scores), np.asarray(included)
    missing = np.isnan(scores)
    if missing.any():
        attack += f" (-inf for {int(missing.sum()):,} scores that were nan)"
    scores = np.where(missing, -np.inf, scores)
    return Audit.from_scores(scores[included], scores[~included], attack=attack, **options)


def num_without_rows(audit: RunAudit | None, opt_state: optax.OptState) -> int:
    """Returns how many canaries there are that are no rows of the data."""
    if audit is None or audit.has_rows:
        return 0
    return len(audit_state(opt_state).included)


class AuditedBatch:
    """The rows of a batch: which are taken from the data, and which are canaries.

    Without an audit all rows are taken from the data.

    Attributes:
        of_data: the rows to take from the data.
        slots: int32 `(batch,)`, the number of the canary in each row; -1 where there is none.
    """

    def __init__(
        self, batch: Batch, audit: RunAudit | None, opt_state: optax.OptState, num_examples: int
    ) -> None:
        self._audit, self.of_data = audit, batch
        if audit is None:
            return
        state = audit_state(opt_state)
        self._canaries, count = state.canaries, len(state.included)
        slots = batch.indices - (num_examples - count)
        is_canary = batch.mask & (slots >= 0)
        is_in = is_canary & state.included[jnp.clip(slots, 0, count - 1)]
        self.slots = jnp.where(is_in, slots, -1)
        taken = batch.mask & (~is_canary | (is_in & audit.has_rows))
        self._indices = batch.indices
        self.of_data = Batch(jnp.where(taken, batch.indices, num_examples), taken)

    def contributing(self, taken: Batch) -> Batch:
        """Returns all rows that contribute, from those that were taken from the data."""
        if self._audit is None or self._audit.has_rows:
            return taken
        return Batch(self._indices, taken.mask | (self.slots >= 0))

    def insert(self, grads: PerExampleGrads) -> PerExampleGrads:
        """Returns the gradients with those of the canaries in their rows."""
        if self._audit is None:
            return grads
        return self._audit.insert(grads, self._canaries, self.slots)

    def values(self, values: PyTree, taken: Batch) -> PyTree:
        """Returns losses and metrics, which are zero in rows that are not of the data."""
        if self._audit is None:
            return values
        return jax.tree.map(lambda leaf: select(taken.mask, leaf), values)
