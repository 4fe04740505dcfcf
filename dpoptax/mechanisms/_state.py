"""The interface of a mechanism with state: its noise depends on that of earlier steps."""

from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import attrs
import jax
import numpy as np
from jaxtyping import Array, Float, Float64, Int, PRNGKeyArray

from dpoptax._pytree import PyTree
from dpoptax.clipping import ClipRule
from dpoptax.mechanisms._base import Mechanism
from dpoptax.per_example import PerExampleGrads
from dpoptax.random import derive_key
from dpoptax.random._threefry_unrolled import unrolled
from dpoptax.schedules import ScalarOrSchedule


@attrs.frozen(repr=False, eq=False)
class NoiseKeys:
    """The noise keys of a run at one step.

    Attributes:
        root: the key that the state of the run has at this step. Keep it to draw the same noise
            again in a later step, by `derive`. Never draw from it: it may serve several steps.
        current: the key of this release, equal to `derive(root, step)`.
        identity: a text about what is released: clip, noise, size, mechanism and shapes.
    """

    root: PRNGKeyArray
    current: PRNGKeyArray
    identity: str

    def derive(self, root: PRNGKeyArray, step: Int[Array, ""] | int) -> PRNGKeyArray:
        """Returns the key of the release that a step with this root made."""
        return release_key(root, self.identity, step)


def release_key(root: PRNGKeyArray, identity: str, step: Int[Array, ""] | int) -> PRNGKeyArray:
    """Derives the key of a release.

    By what is released, so that a state that is restored into a changed transformation draws other
    noise: the difference of two releases with the same noise would have none.
    """
    return jax.random.fold_in(derive_key(unrolled(root), identity), step)


class PastKeys(NamedTuple):
    """Root keys of steps that were made, in the state of a mechanism.

    A run that continues with new keys after a crash replaces all keys of its state but these: they
    say what the noise of the steps before was.
    """

    keys: PRNGKeyArray


@runtime_checkable
class StatefulMechanism(Protocol):
    """The interface of a mechanism with state, for noise that depends on earlier noise.

    It has `init`, `release_with_state`, `num_steps`, `noise_scales`, `check` and `caveat`. All else
    is as in `Mechanism`. The state travels in `PrivatizeState`. It is as secret as a key: with the
    state, noise can be computed and subtracted. A key in it is replaced if a run continues with new
    keys after a crash.

    The accountant knows how the noise of `Correlated` depends on earlier noise. For any other
    mechanism it assumes independent Gaussian noise in each step, of standard deviation
    `noise_multiplier * clip.l2_clip`. A run of yours must be at least as private as that.

    Example:
        >>> from dpoptax.mechanisms import Gaussian
        >>> isinstance(Gaussian(), StatefulMechanism)
        False
    """

    @property
    def caveat(self) -> str:
        """What the privacy statement assumes about the noise; the report prints it."""

    @property
    def num_steps(self) -> int | None:
        """How many steps a run may have; None for any number.

        After them, `privatize` raises an error, or releases NaN inside compiled functions.
        """

    def init(self, params: PyTree, key: PRNGKeyArray) -> PyTree:
        """Returns the state before the first step.

        Args:
            params: the parameters, or their shapes. Arrays like them are sharded as they are.
            key: the root key before the first step. It tells the type of keys.
        """

    def release_with_state(
        self,
        keys: NoiseKeys,
        grads: PerExampleGrads,
        clip: ClipRule,
        noise_multiplier: ScalarOrSchedule,
        step: Int[Array, ""] | int,
        state: Any,
    ) -> tuple[PyTree[Float[Array, "..."]], PyTree]:
        """Returns the noisy clipped sum, in float32 or wider, and the state of the next step.

        Args:
            keys: the keys of this step. Draw from `keys.current` what no step has drawn before.
            grads: the per-example gradients of the batch.
            clip: the clip rule.
            noise_multiplier: standard deviation of independent noise, divided by the clip bound.
            step: the number of the release.
            state: of this step.
        """

    def noise_scales(self) -> Float64[np.ndarray, " steps"]:
        """Returns the standard deviation of each step's noise, divided by multiplier and bound.

        The last number holds for all later steps.
        """

    def check(self, clip: ClipRule, noise_multiplier: ScalarOrSchedule) -> None:
        """Raises if the mechanism does not support this clip rule or noise.

        Args:
            clip: the clip rule.
            noise_multiplier: as in `release_with_state`.
        """


# A mechanism of either kind.
AnyMechanism: TypeAlias = Mechanism | StatefulMechanism
