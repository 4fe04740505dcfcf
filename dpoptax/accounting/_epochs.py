"""Steps of a run whose length is given in epochs: passes over the data on average."""

from dpoptax import _validate
from dpoptax.samplers import Sampler
from dpoptax.schedules import as_schedule


def num_steps_of(
    sampler: Sampler, epochs: float | None, num_steps: int | None, *, at_least: int = 1
) -> int:
    """Returns the number of steps, or that of the epochs, rounded up.

    Raises:
        TypeError: both or none of the two are given.
        ValueError: there are too many steps to count.
    """
    _validate.epochs_or_steps(epochs, num_steps)
    if epochs is None:
        steps = _validate.count("num_steps", num_steps, at_least=at_least)
    else:
        steps = _steps_of(sampler, epochs)
    if steps >= 2**31:
        raise ValueError(
            f"num_steps must be below 2**31, for steps are counted in int32; got {steps}."
        )
    return steps


def _steps_of(sampler: Sampler, epochs: float) -> int:
    sizes = as_schedule(sampler.expected_batch_size)
    passes = _validate.positive("epochs", epochs)
    # A schedule's last size holds until the run ends, so all sizes before it are used first.
    steps, examples = 0, passes * sampler.num_examples
    for size, length in zip(sizes.values[:-1], sizes.lengths[:-1], strict=True):
        if examples <= size * length:
            return steps + _validate.whole_steps(examples / size)
        steps, examples = steps + length, examples - size * length
    if steps == 0:
        return _validate.steps_of_epochs(epochs, sampler.num_examples, sizes.values[-1])
    return steps + _validate.whole_steps(examples / sizes.values[-1])
