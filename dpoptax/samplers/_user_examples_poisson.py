"""Poisson sampling of examples under a guarantee for users, who have limited many of them."""

from typing import Any, ClassVar

import attrs
import dp_accounting
import jax
import numpy as np
from dp_accounting import NeighboringRelation
from jaxtyping import Int

from dpoptax import _validate
from dpoptax._dp_events import LimitedPoissonDpEvent, compose_passes, poisson_group_event
from dpoptax._foreign_names import answer_foreign_names
from dpoptax._pytree import PyTree
from dpoptax.relations import Relation, parse_relation
from dpoptax.samplers._base import Batch, Sampler, SamplerState
from dpoptax.samplers._poisson import Poisson
from dpoptax.samplers._user_ids import check_data, checked_user_ids
from dpoptax.schedules import ScalarOrSchedule


@attrs.frozen(init=False, eq=False)
class UserExamplesPoisson(Sampler):
    """Poisson sampling of examples, so that a user with all of its examples is protected.

    Each example joins a batch independently and is clipped on its own, as under `Poisson`. But
    neighbouring data sets differ in one user, who has up to `max_examples_per_user` examples.
    Binomially many of them take part in a step. The privacy loss of this mixture of Gaussians is
    computed numerically, and is tight. `arrange` drops the other examples of a user.

    `UserPoisson` draws whole users instead. It often learns more where users have many examples,
    because the clip then acts on the mean of a user.

    Attributes:
        user_ids: the user of every example, integers or strings, `(num_rows,)`; kept on the host.
        expected_batch_size: in examples; need not be whole.
        max_examples_per_user: the first this many examples of a user are kept.
        max_batch_size: in examples; as in `Poisson`.

    Raises:
        TypeError: a count is not a whole number.
        ValueError: user_ids is empty or not a vector, or a number is out of range.

    Example:
        >>> import numpy as np
        >>> sampler = UserExamplesPoisson(
        ...     ["ann", "bob", "ann", "ann"], expected_batch_size=1, max_examples_per_user=2
        ... )
        >>> sampler.arrange(np.array([1.0, 2.0, 3.0, 4.0])), sampler.unit
        (array([1., 2., 3.]), 'user')

    Reference: Charles et al. 2024, arXiv:2407.07737 (example-level sampling).
    """

    user_ids: Any = attrs.field(repr=False)
    expected_batch_size: float
    max_examples_per_user: int
    max_batch_size: int
    # Computed from the fields above.
    _kept: Int[np.ndarray, " num_examples"] = attrs.field(repr=False)
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
        kept = _first_rows_of_users(user_ids, most)
        expected = _validate.expected_batch_size(
            "expected_batch_size, in examples that are kept,", expected_batch_size, len(kept)
        )
        self._set(user_ids, most, kept, Poisson(len(kept), expected, max_batch_size))

    def _set(self, user_ids: Any, most: int, kept: np.ndarray, poisson: Poisson) -> None:
        sizes = (poisson.expected_batch_size, most, poisson.max_batch_size)
        self.__attrs_init__(user_ids, *sizes, kept, poisson)

    @classmethod
    def _from_record(
        cls,
        num_examples: int,
        expected_batch_size: float,
        max_examples_per_user: int,
        max_batch_size: int,
    ) -> "UserExamplesPoisson":
        """Returns a sampler that was read from JSON: it draws examples, but cannot arrange data."""
        poisson = Poisson(num_examples, expected_batch_size, max_batch_size)
        most = _validate.count("max_examples_per_user", max_examples_per_user)
        self = cls.__new__(cls)
        self._set(None, most, np.zeros(0, np.int64), poisson)
        return self

    @property
    def num_examples(self) -> int:
        """How many examples are kept: the rows of arranged data."""
        return self._poisson.num_examples

    @property
    def sampling_rate(self) -> float:
        """The probability that an example is in a batch."""
        return self._poisson.sampling_rate

    def resized(self, max_batch_size: int | None) -> "UserExamplesPoisson":
        """See `Sampler.resized`."""
        copy = type(self).__new__(type(self))
        poisson = self._poisson.resized(max_batch_size)
        copy._set(self.user_ids, self.max_examples_per_user, self._kept, poisson)
        return copy

    def arrange(self, data: PyTree) -> PyTree:
        """Returns the examples that are kept, in their order.

        Args:
            data: a tree of arrays with one row per entry of `user_ids`.

        Returns:
            A tree of arrays with `num_examples` rows.

        Raises:
            ValueError: data has another length, or this sampler was read from JSON, which does not
                hold the user of every example.
        """
        check_data(data, self.user_ids, "UserExamplesPoisson")
        return jax.tree.map(lambda leaf: leaf[self._kept], data)

    def sample(self, state: SamplerState) -> tuple[SamplerState, Batch]:
        """Returns the next state and the next batch of examples."""
        return self._poisson.sample(state)

    def event(
        self,
        noise_multiplier: ScalarOrSchedule,
        num_steps: int,
        relation: Relation | None = None,
    ) -> dp_accounting.DpEvent:
        """Returns the event of `num_steps` noisy sums; neighbours differ in one user.

        Raises:
            ValueError: under `replace_one`, for which nothing is proven.
        """
        if parse_relation(relation or self.relation) == NeighboringRelation.REPLACE_ONE:
            raise ValueError(
                "UserExamplesPoisson has no guarantee under replace_one, where the examples of one "
                "user give way to those of another. Take relation='add_or_remove_one', or draw "
                "whole users: UserPoisson."
            )
        most = min(self.max_examples_per_user, self.num_examples)

        def one_step(noise_multiplier: float) -> dp_accounting.DpEvent:
            event = poisson_group_event(self.sampling_rate, noise_multiplier, most)
            if self.max_batch_size == self.num_examples:
                return event
            sizes = (self.num_examples, self.sampling_rate, self.max_batch_size)
            return LimitedPoissonDpEvent(event, *sizes, group_size=most)

        return compose_passes(one_step, noise_multiplier, num_steps)


def _first_rows_of_users(user_ids: np.ndarray, most: int) -> np.ndarray:
    """Returns the rows of the first examples of each user, in ascending order."""
    _, user_of_row = np.unique(user_ids, return_inverse=True)
    # A stable sort keeps the rows of a user in their order.
    by_user = np.argsort(user_of_row, kind="stable")
    counts = np.bincount(user_of_row)
    rank = np.arange(len(user_ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(by_user[rank < most])
