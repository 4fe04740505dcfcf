"""Iterate averaging: the average of the last iterates of a run, where it is better than the last.

The noise of private gradients keeps parameters moving around their optimum, and an average over
iterates moves less. But an average also lags behind parameters that still drift. Both effects show
in the iterates, which are public, so the choice is post-processing.

The last half of a run is cut into blocks. For the last m blocks, with block means that have a slope
b per block and a variance s^2 around it, and with a variance v of iterates,

    error of the average = (b m / 2)^2 + s^2 / m,   error of the last iterate = v

For each parameter the window with the smallest error is chosen, where errors are averages over
coordinates, each in units of v. The part of b^2 that s^2 explains is subtracted. If neighbouring
block means are correlated, s^2 is larger by a factor.

References: Polyak and Juditsky 1992 for the average; Dhaka et al. 2020, "Robust, accurate
stochastic optimization for variational inference", for R-hat of the iterates.
"""

import functools
import math
from typing import Any, NamedTuple

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from dpoptax._precision import widen
from dpoptax._pytree import PyTree
from dpoptax.transforms._private import PrivateOptimizer, require_params

NUM_BLOCKS = 16
# Two means and a slope need at least this many.
_FEWEST_BLOCKS = 4
# An integrated autocorrelation time of a tenth of the window gives this R-hat.
MOVING = 1.1


class IteratesState(NamedTuple):
    """Means of the parameters over blocks, that of the latest block, and sums of squares around."""

    step: Int[Array, ""]
    block_means: PyTree
    latest_mean: PyTree
    squares_in_blocks: PyTree


@attrs.frozen
class Convergence:
    """Whether the parameters have settled; computed from public iterates.

    Attributes:
        num_averaged_steps: by name of the parameter, the length of the recommended average; 0 if
            the last iterate is better.
        rhat: by name of the parameter, split R-hat of its iterates over the last half of the run.
            It compares the first half of these steps with the second: 1 means that they agree.
            Above 1.1 the parameter is still moving. It is inf if the run was too short to tell.
    """

    num_averaged_steps: dict[str, int]
    rhat: dict[str, float]

    @property
    def settled(self) -> bool:
        """Whether no parameter is still moving."""
        return all(value <= MOVING for value in self.rhat.values())

    def __str__(self) -> str:
        """Returns what has settled, what has not, and what was averaged."""
        if any(value == math.inf for value in self.rhat.values()):
            return "The run was too short to tell whether the parameters have settled."
        moving = [name for name, value in self.rhat.items() if value > MOVING]
        text = f"The parameters have settled (R-hat at most {max(self.rhat.values()):.2f})."
        if moving:
            worst = sorted(moving, key=lambda name: -self.rhat[name])
            named = ", ".join(f"{name} ({self.rhat[name]:.2f})" for name in worst[:3])
            more = f" and {len(worst) - 3} more" * (len(worst) > 3)
            text = f"Still moving, by R-hat of the iterates: {named}{more}."
        averaged = sorted({steps for steps in self.num_averaged_steps.values() if steps})
        last = [name for name, steps in self.num_averaged_steps.items() if not steps]
        if averaged:
            spans = " or ".join(str(steps) for steps in averaged)
            text += f" Recommended: averages of the last {spans} iterates"
            text += f", and the last iterate of {', '.join(sorted(last)[:3])}." if last else "."
        else:
            text += " Recommended: the last iterate, because averages would lag behind."
        if moving:
            text += " Train for more steps, or lower the learning rate towards the end."
        return text


def keep_iterates(num_steps: int) -> optax.GradientTransformation:
    """Keeps block means of the parameters over the last half of `num_steps`; changes no update.

    It must be last in `optax.chain`: it expects updates that are added to the parameters.
    """
    length = num_steps // (2 * NUM_BLOCKS)
    first = num_steps - NUM_BLOCKS * length

    def init(params: PyTree) -> IteratesState:
        blocks = NUM_BLOCKS if length else 0
        wide = jax.tree.map(lambda leaf: jnp.zeros_like(widen(leaf)), params)
        means = jax.tree.map(lambda leaf: jnp.zeros((blocks, *leaf.shape), leaf.dtype), wide)
        return IteratesState(jnp.zeros((), jnp.int32), means, wide, jax.tree.map(jnp.copy, wide))

    def update(
        updates: PyTree, state: IteratesState, params: Any = None
    ) -> tuple[PyTree, IteratesState]:
        step = state.step + 1
        if not length:
            return updates, state._replace(step=step)
        index = jnp.maximum((state.step - first) // length, 0)
        count = (state.step - first) % length + 1
        # Up to `first` the first block is written too, and then starts over.
        kept = state.step >= first

        # Welford's recursion: it loses no digits where a mean is large and its spread is small.
        def moved(
            means: Array, mean: Array, squares: Array, leaf: Array, change: Array
        ) -> tuple[Array, Array, Array]:
            now = widen((leaf + change).astype(leaf.dtype))
            before = jnp.where(count == 1, 0, now - mean)
            mean = jnp.where(count == 1, now, mean + before / count.astype(now.dtype))
            squares = squares + jnp.where(kept, before * (now - mean), 0)
            # All blocks are written to only, so that XLA updates them in place.
            return means.at[index].set(mean), mean, squares

        found = jax.tree.map(moved, *state[1:], require_params(params), updates)
        outer, inner = jax.tree.structure(params), jax.tree.structure((0, 0, 0))
        return updates, IteratesState(step, *jax.tree.transpose(outer, inner, found))

    return optax.GradientTransformation(init, update)


def with_iterates(
    optimizer: optax.GradientTransformation, num_steps: int
) -> optax.GradientTransformation:
    """Returns the optimizer, followed by `keep_iterates`."""
    if isinstance(optimizer, PrivateOptimizer):
        # It acts before the clip, so it must stay outermost.
        inner = with_iterates(optimizer.optimizer, num_steps)
        return PrivateOptimizer("an optimizer of dpoptax.transforms", inner, optimizer.wrap)
    return optax.chain(optimizer, keep_iterates(num_steps))


def recommend(
    params: dict[str, PyTree], state: IteratesState, num_steps: int
) -> tuple[dict[str, PyTree], Convergence]:
    """Returns the average of the last iterates or the last iterate, and whether they settled.

    Args:
        params: the last iterate, by name.
        state: of `keep_iterates(num_steps)`.
        num_steps: as planned; fewer may have run.
    """
    length = num_steps // (2 * NUM_BLOCKS)
    kept = int(state.step) - (num_steps - NUM_BLOCKS * length)
    full = min(max(kept, 0) // length, NUM_BLOCKS) if length else 0
    if full < _FEWEST_BLOCKS:
        return params, Convergence(dict.fromkeys(params, 0), dict.fromkeys(params, math.inf))
    # Each block that has begun takes one degree of freedom.
    freedom = max(kept - -(-kept // length), 1)
    recommended, steps, rhat = {}, {}, {}
    for name, last in params.items():
        means = _by_coordinate(state.block_means[name], full)
        inside = _by_coordinate(state.squares_in_blocks[name], None) / freedom
        window = _best_window(means, inside)
        steps[name], rhat[name] = window * length, _rhat(means, inside)
        recommended[name] = last
        if window:
            recommended[name] = jax.tree.map(
                functools.partial(_average, first=full - window, end=full),
                state.block_means[name],
                last,
            )
    return recommended, Convergence(steps, rhat)


def _average(means: Array, last: Array, *, first: int, end: int) -> Array:
    return jnp.mean(means[first:end], axis=0).astype(last.dtype)


def _by_coordinate(tree: PyTree, full: int | None) -> np.ndarray:
    """Returns all coordinates side by side: `(full, coordinates)`, or `(coordinates,)`."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    if full is None:
        return np.concatenate([leaf.reshape(-1) for leaf in leaves])
    return np.concatenate([leaf[:full].reshape(full, -1) for leaf in leaves], axis=1)


def _best_window(means: np.ndarray, inside: np.ndarray) -> int:
    """Returns the number of last blocks to average; 0 for the last iterate."""
    windows = [len(means)]
    while windows[-1] // 2 >= _FEWEST_BLOCKS:
        windows.append(windows[-1] // 2)
    longest = _residuals(means)
    variance = inside + _variance(longest)
    moves = variance > 0
    if not moves.any():
        return 0
    means, variance = means[:, moves], variance[moves]
    inflation = _inflation(longest[:, moves] / np.sqrt(variance))
    shortest = _variance(_residuals(means[-windows[-1] :]))
    errors = {0: float(np.mean((inside[moves] + shortest) / variance))}
    for window in windows:
        last = means[-window:]
        noise = inflation * _variance(_residuals(last))
        # The slope of independent blocks varies by 12 s^2 / (m (m^2 - 1)).
        lag = (_slope(last) * window / 2) ** 2 - 3 * noise * window / (window**2 - 1)
        drift = max(float(np.mean(lag / variance)), 0.0)
        errors[window] = drift + float(np.mean(noise / variance)) / window
    return min(errors, key=lambda window: errors[window])


def _inflation(residuals: np.ndarray) -> float:
    """Returns the factor by which blocks that depend on each other make averages less certain."""
    # The lag-1 correlation of residuals of a line is low by about (1 + 4 rho) / n.
    found = (residuals[1:] * residuals[:-1]).sum() / (residuals**2).sum()
    correlation = float(np.clip((found * len(residuals) + 1) / (len(residuals) - 4), 0, 0.9))
    return (1 + correlation) / (1 - correlation)


def _times(size: int) -> np.ndarray:
    return (np.arange(size) - (size - 1) / 2)[:, None]


def _slope(means: np.ndarray) -> np.ndarray:
    """Returns the slope per block of the least-squares line of block means."""
    times = _times(len(means))
    return (times * means).sum(axis=0) / (times**2).sum()


def _residuals(means: np.ndarray) -> np.ndarray:
    return means - means.mean(axis=0) - _times(len(means)) * _slope(means)


def _variance(residuals: np.ndarray) -> np.ndarray:
    return (residuals**2).sum(axis=0) / (len(residuals) - 2)


def _rhat(means: np.ndarray, inside: np.ndarray) -> float:
    """Returns split R-hat, with the ratio of variances averaged over coordinates."""
    half = len(means) // 2
    first, second = means[:half], means[-half:]
    within = inside + (first.var(axis=0, ddof=1) + second.var(axis=0, ddof=1)) / 2
    between = (first.mean(axis=0) - second.mean(axis=0)) ** 2 / 2
    moves = within > 0
    if not moves.any():
        return 1.0
    return float(np.sqrt(1 + np.mean(between[moves] / within[moves])))
