"""User-level Poisson sampling: the unit of privacy is a user with all of its examples."""

from typing import Any, ClassVar

import attrs
import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dpoptax import _validate
from dpoptax._foreign_names import answer_foreign_names
from dpoptax._pytree import PyTree
from dpoptax.relations import Relation
from dpoptax.samplers._base import Batch, Sampler, SamplerState
from dpoptax.samplers._poisson import Poisson
from dpoptax.samplers._user_ids import check_data, checked_user_ids
from dpoptax.schedules import ScalarOrSchedule


@attrs.frozen(init=False, eq=False)
class UserPoisson(Sampler):
    """Poisson sampling of users, so that users are protected and not only single examples.

    A user is what is sampled, clipped and accounted: a neighbouring data set has one more user.
    `arrange` turns the data into one row per user. The loss of one row then sees up to
    `max_examples_per_user` examples and a mask, and should be their mean.

    Attributes:
        user_ids: the user of every example, integers or strings, `(num_rows,)`; kept on the host.
        expected_batch_size: in users; need not be whole.
        max_examples_per_user: the first this many examples of a user are kept.
        max_batch_size: in users; as in `Poisson`.

    Raises:
        TypeError: a count is not a whole number.
        ValueError: user_ids is empty or not a vector, or a number is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> sampler = UserPoisson(
        ...     ["ann", "bob", "ann"], expected_batch_size=1, max_examples_per_user=2
        ... )
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

    user_ids: Any = attrs.field(repr=False)
    expected_batch_size: float
    max_examples_per_user: int
    max_batch_size: int
    # Computed from the fields above.
    _rows: Int[np.ndarray, "num_users max_examples_per_user"] = attrs.field(repr=False)
    _present: Bool[np.ndarray, "num_users max_examples_per_user"] = attrs.field(repr=False)
    _poisson: Poisson = attrs.field(repr=False)

    unit: ClassVar[str] = "user"

    @answer_foreign_names
    def __init__(
        self,
        user_ids: Any,
        expected_batch_size: float,
        max_examples_per_user: int,
        max_batch_size: int | None = None,
    ) -> None:
        user_ids = checked_user_ids(user_ids)
        most = _validate.count("max_examples_per_user", max_examples_per_user)
        rows, present = _rows_of_users(user_ids, most)
        users = _validate.expected_batch_size(
            "expected_batch_size, in users,", expected_batch_size, len(rows)
        )
        poisson = Poisson(len(rows), users, max_batch_size)
        self.__attrs_init__(
            user_ids,
            poisson.expected_batch_size,
            most,
            poisson.max_batch_size,
            rows,
            present,
            poisson,
        )

    @classmethod
    def _from_record(
        cls,
        num_examples: int,
        expected_batch_size: float,
        max_examples_per_user: int,
        max_batch_size: int,
    ) -> "UserPoisson":
        """Returns a sampler that was read from JSON: it draws users, but cannot arrange data."""
        poisson = Poisson(num_examples, expected_batch_size, max_batch_size)
        most = _validate.count("max_examples_per_user", max_examples_per_user)
        self = cls.__new__(cls)
        no_rows = np.zeros((0, most), np.int64)
        self.__attrs_init__(
            None,
            poisson.expected_batch_size,
            most,
            poisson.max_batch_size,
            no_rows,
            no_rows.astype(bool),
            poisson,
        )
        return self

    @property
    def num_examples(self) -> int:
        """How many users there are: the units that are sampled."""
        return self._poisson.num_examples

    @property
    def sampling_rate(self) -> float:
        """The probability that a user is in a batch."""
        return self._poisson.sampling_rate

    def resized(self, max_batch_size: int | None) -> "UserPoisson":
        """See `Sampler.resized`."""
        poisson = self._poisson.resized(max_batch_size)
        copy = type(self).__new__(type(self))
        copy.__attrs_init__(
            self.user_ids,
            poisson.expected_batch_size,
            self.max_examples_per_user,
            poisson.max_batch_size,
            self._rows,
            self._present,
            poisson,
        )
        return copy

    def arrange(
        self, data: PyTree
    ) -> tuple[PyTree, Bool[Array, "num_users max_examples_per_user"]]:
        """Turns a tree of arrays `(num_rows, ...)` into one row per user.

        Args:
            data: a tree of arrays with one row per entry of `user_ids`.

        Returns:
            A tree of arrays `(num_users, max_examples_per_user, ...)`, and a mask that is True
            where a user has an example. All other entries are zero.

        Raises:
            ValueError: data has another length, or this sampler was read from JSON, which does not
                hold the user of every example.
        """
        check_data(data, self.user_ids, "UserPoisson")
        present = jnp.asarray(self._present)

        # Missing examples are zeroed, since a gathered row of another user must not leak in.
        def gather(leaf: Any) -> Array:
            picked = jnp.asarray(leaf)[self._rows]
            mask = present.reshape(*present.shape, *[1] * (picked.ndim - 2))
            return jnp.where(mask, picked, jnp.zeros_like(picked))

        return jax.tree.map(gather, data), present

    def sample(self, state: SamplerState) -> tuple[SamplerState, Batch]:
        """Returns the next state and the next batch of users."""
        return self._poisson.sample(state)

    def event(
        self,
        noise_multiplier: ScalarOrSchedule,
        num_steps: int,
        relation: Relation | None = None,
    ) -> dp_accounting.DpEvent:
        """Returns the event of `num_steps` noisy sums; neighbours differ in one user."""
        return self._poisson.event(noise_multiplier, num_steps, relation)


def _rows_of_users(user_ids: np.ndarray, max_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of each user `(num_users, max_examples)`, and where there is one."""
    _, user_of_row = np.unique(user_ids, return_inverse=True)
    # A stable sort keeps the rows of a user in their order: the first ones are those kept.
    rows_by_user = np.argsort(user_of_row, kind="stable")
    counts = np.bincount(user_of_row)
    positions = np.cumsum(counts)[:, None] - counts[:, None] + np.arange(max_examples)
    present = np.arange(max_examples) < counts[:, None]
    return rows_by_user[np.where(present, positions, 0)], present
