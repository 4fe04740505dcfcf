"""Users as the unit of privacy: one row per user, with all that is kept of it."""

import dataclasses
from typing import Any, ClassVar

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree

from dpoptax import _validate
from dpoptax.relations import Relation
from dpoptax.samplers._base import Batch, SamplerState
from dpoptax.samplers._poisson import Poisson
from dpoptax.schedules import Scheduled


@dataclasses.dataclass(frozen=True, eq=False)
class UserPoisson:
    """Poisson sampling of users, each with all of its examples, so that users are protected.

    What is sampled, clipped and accounted is a user: a neighbouring data set has one user more.
    `arrange` brings the data to one row per user; the loss of one row then sees up to
    `max_examples_per_user` examples and a mask, and is best their mean.

    Attributes:
        user_ids: whose every example is, any integers or strings, `(num_rows,)`; held on the host.
        expected_batch_size: in users; need not be whole.
        max_examples_per_user: of a user with more, the first ones are kept.
        max_batch_size: in users; as in `Poisson`.

    Raises:
        TypeError: a count that is not whole.
        ValueError: user_ids that are not a vector, or empty; a number out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> sampler = UserPoisson(["ann", "bob", "ann"], expected_batch_size=1, max_examples_per_user=2)
        >>> rows, mask = sampler.arrange(jnp.array([1.0, 2.0, 3.0]))
        >>> rows.tolist(), mask.tolist()
        ([[1.0, 3.0], [2.0, 0.0]], [[True, True], [True, False]])
        >>> def loss_fn(w, row):
        ...     x, mask = row
        ...     return jnp.sum(jnp.where(mask, (w - x) ** 2, 0)) / jnp.sum(mask)
        >>> sampler.num_examples, sampler.expected_batch_size
        (2, 1.0)

    Reference: McMahan et al. 2018, arXiv:1710.06963.
    """

    user_ids: Any
    expected_batch_size: float
    max_examples_per_user: int
    max_batch_size: int | None = None

    unit: ClassVar[str] = "user"
    relation: ClassVar[str] = "add_or_remove_one"

    def __post_init__(self) -> None:
        user_ids = np.asarray(self.user_ids)
        if user_ids.ndim != 1 or len(user_ids) == 0:
            raise ValueError(
                "user_ids must name the user of every example, one after the other; got an array "
                f"of shape {user_ids.shape}."
            )
        cap = _validate.count("max_examples_per_user", self.max_examples_per_user)
        _, of_user = np.unique(user_ids, return_inverse=True)
        by_user = np.argsort(of_user, kind="stable")
        counts = np.bincount(of_user)
        places = np.cumsum(counts)[:, None] - counts[:, None] + np.arange(cap)
        present = np.arange(cap) < counts[:, None]
        object.__setattr__(self, "user_ids", user_ids)
        object.__setattr__(self, "max_examples_per_user", cap)
        object.__setattr__(self, "_members", by_user[np.where(present, places, 0)])
        object.__setattr__(self, "_present", present)
        poisson = Poisson(len(counts), self.expected_batch_size, self.max_batch_size)
        object.__setattr__(self, "_poisson", poisson)
        object.__setattr__(self, "expected_batch_size", poisson.expected_batch_size)
        object.__setattr__(self, "max_batch_size", poisson.max_batch_size)

    @property
    def num_examples(self) -> int:
        """How many users there are: the units that are sampled."""
        return self._poisson.num_examples

    @property
    def sampling_rate(self) -> float:
        """The probability that a user is in a batch."""
        return self._poisson.sampling_rate

    def arrange(
        self, data: PyTree
    ) -> tuple[PyTree, Bool[Array, "num_users max_examples_per_user"]]:
        """Brings a tree of arrays `(num_rows, ...)` to one row per user.

        Args:
            data: as long as `user_ids`.

        Returns:
            A tree of arrays `(num_users, max_examples_per_user, ...)`, zero where a user has
            fewer, and the mask that tells.

        Raises:
            ValueError: data of another length.
        """
        rows = _validate.batch_size("data", data)
        if rows != len(self.user_ids):
            raise ValueError(
                f"data must have one row per entry of user_ids; got {rows} rows and "
                f"{len(self.user_ids)} entries."
            )
        present = jnp.asarray(self._present)

        def gather(leaf: Array) -> Array:
            picked = jnp.asarray(leaf)[self._members]
            shown = present.reshape(*present.shape, *[1] * (picked.ndim - 2))
            return jnp.where(shown, picked, jnp.zeros_like(picked))

        return jax.tree.map(gather, data), present

    def init(self, key: PRNGKeyArray, step: int = 0) -> SamplerState:
        """Returns the state before batch number `step`.

        `key` must serve sampling and nothing else.
        """
        return self._poisson.init(key, step)

    def sample(self, state: SamplerState) -> tuple[SamplerState, Batch]:
        """Returns the next state and the next batch of users."""
        return self._poisson.sample(state)

    def event(
        self, noise_multiplier: Scheduled, num_steps: int, relation: Relation = "add_or_remove_one"
    ) -> dp_accounting.DpEvent:
        """Returns the event of `num_steps` noisy sums; neighbours differ in one user."""
        return self._poisson.event(noise_multiplier, num_steps, relation)

    _members: Any = dataclasses.field(init=False, repr=False)
    _present: Any = dataclasses.field(init=False, repr=False)
    _poisson: Any = dataclasses.field(init=False, repr=False)
