"""Aliases that only compose: `privatize`, followed by an Optax optimizer."""

import optax
from jaxtyping import PRNGKeyArray

from dpoptax._foreign_names import answer_foreign_names
from dpoptax.clipping._state import AnyClipRule
from dpoptax.schedules import ScalarOrSchedule
from dpoptax.transforms._adam_bc import scale_by_adam_bc
from dpoptax.transforms._chain import chain
from dpoptax.transforms._privatize import privatize


@answer_foreign_names
def dp_sgd(
    learning_rate: optax.ScalarOrSchedule,
    clip: AnyClipRule | ScalarOrSchedule,
    *,
    noise_multiplier: ScalarOrSchedule,
    expected_batch_size: ScalarOrSchedule,
    key: PRNGKeyArray,
    momentum: float | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Private stochastic gradient descent: `optax.chain(privatize(...), optax.sgd(...))`.

    With `clip=math.inf` and `noise_multiplier=0` it is `optax.sgd` on the mean gradient.

    Args:
        learning_rate: a number or an Optax schedule.
        clip: as in `privatize`.
        noise_multiplier: as in `privatize`.
        expected_batch_size: as in `privatize`.
        key: as in `privatize`.
        momentum: as in `optax.sgd`.
        nesterov: as in `optax.sgd`.

    Returns:
        A transformation of per-example gradients.

    Raises:
        TypeError: as in `privatize`.
        ValueError: as in `privatize`.

    Example:
        >>> import jax, jax.numpy as jnp, math
        >>> tx = dp_sgd(
        ...     0.5, math.inf, noise_multiplier=0.0, expected_batch_size=2, key=jax.random.key(0)
        ... )
        >>> params = {"w": jnp.zeros(1)}
        >>> updates, _ = tx.update({"w": jnp.array([[1.0], [3.0]])}, tx.init(params), params)
        >>> updates["w"]
        Array([-1.], dtype=float32)

    Reference: Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
    """
    return optax.chain(
        privatize(clip, noise_multiplier, expected_batch_size=expected_batch_size, key=key),
        optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    )


@answer_foreign_names
def dp_adam(
    learning_rate: optax.ScalarOrSchedule,
    clip: AnyClipRule | ScalarOrSchedule,
    *,
    noise_multiplier: ScalarOrSchedule,
    expected_batch_size: ScalarOrSchedule,
    key: PRNGKeyArray,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Private Adam: `optax.chain(privatize(...), optax.adam(...))`.

    With `clip=math.inf` and `noise_multiplier=0` it is `optax.adam` on the mean gradient.

    Args:
        learning_rate: a number or an Optax schedule.
        clip: as in `privatize`.
        noise_multiplier: as in `privatize`.
        expected_batch_size: as in `privatize`.
        key: as in `privatize`.
        b1: as in `optax.adam`.
        b2: as in `optax.adam`.
        eps: as in `optax.adam`.

    Returns:
        A transformation of per-example gradients.

    Raises:
        TypeError: as in `privatize`.
        ValueError: as in `privatize`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> tx = dp_adam(
        ...     0.1, 1.0, noise_multiplier=1.1, expected_batch_size=2, key=jax.random.key(0)
        ... )
        >>> params = {"w": jnp.zeros(1)}
        >>> updates, _ = tx.update({"w": jnp.array([[1.0], [3.0]])}, tx.init(params), params)
        >>> updates["w"].shape
        (1,)

    Reference: Kingma and Ba 2015, arXiv:1412.6980, on the gradient of arXiv:1607.00133.
    """
    return optax.chain(
        privatize(clip, noise_multiplier, expected_batch_size=expected_batch_size, key=key),
        optax.adam(learning_rate, b1=b1, b2=b2, eps=eps),
    )


@answer_foreign_names
def dp_adam_bc(
    learning_rate: optax.ScalarOrSchedule,
    clip: AnyClipRule | ScalarOrSchedule,
    *,
    noise_multiplier: ScalarOrSchedule,
    expected_batch_size: ScalarOrSchedule,
    key: PRNGKeyArray,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    floor: float = 0.01,
) -> optax.GradientTransformation:
    """Private Adam without the noise in the second moment: `privatize`, then `scale_by_adam_bc`.

    With `clip=math.inf` and `noise_multiplier=0` it is `optax.adam` on the mean gradient.

    Args:
        learning_rate: a number or an Optax schedule.
        clip: as in `privatize`.
        noise_multiplier: as in `privatize`.
        expected_batch_size: as in `privatize`.
        key: as in `privatize`.
        b1: as in `scale_by_adam_bc`.
        b2: as in `scale_by_adam_bc`.
        eps: as in `scale_by_adam_bc`.
        floor: as in `scale_by_adam_bc`.

    Returns:
        A transformation of per-example gradients.

    Raises:
        TypeError: as in `privatize`.
        ValueError: as in `privatize`, or a number is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> tx = dp_adam_bc(
        ...     0.1, 1.0, noise_multiplier=1.1, expected_batch_size=2, key=jax.random.key(0)
        ... )
        >>> params = {"w": jnp.zeros(1)}
        >>> updates, _ = tx.update({"w": jnp.array([[1.0], [3.0]])}, tx.init(params), params)
        >>> updates["w"].shape
        (1,)

    Reference: Tang, Shpilevskiy and Lécuyer 2024, arXiv:2312.14334, algorithm 1.
    """
    return chain(
        privatize(clip, noise_multiplier, expected_batch_size=expected_batch_size, key=key),
        optax.chain(
            scale_by_adam_bc(b1, b2, eps, floor=floor), optax.scale_by_learning_rate(learning_rate)
        ),
    )
