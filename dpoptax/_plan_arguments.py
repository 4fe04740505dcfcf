"""Arguments of a plan: what is accepted, and what is meant by the short forms."""

from collections.abc import Mapping
from typing import Any

from dpoptax import _serialize
from dpoptax._validate import described
from dpoptax.accounting._correlated import check_clip, strategy_of
from dpoptax.accounting._epsilon import run_event
from dpoptax.clipping import ClipRule, StatefulClipRule
from dpoptax.clipping._state import AnyClipRule
from dpoptax.mechanisms import Mechanism, StatefulMechanism
from dpoptax.mechanisms._state import AnyMechanism
from dpoptax.samplers import Poisson, Sampler
from dpoptax.schedules import ScalarOrSchedule, tabulate


def check_sampler(sampler: Any) -> None:
    """Raises unless this is a sampler."""
    if not isinstance(sampler, Sampler):
        raise TypeError(
            "sampler must be one of dpoptax.samplers, or derive from dpoptax.samplers.Sampler; "
            f"got {described(sampler)}. Pass for example dpoptax.samplers.Poisson(num_examples, "
            "expected_batch_size)."
        )


def check_mechanism(mechanism: Any) -> None:
    """Raises unless this is a mechanism."""
    # A class has the attributes of the interface too.
    if not isinstance(mechanism, Mechanism | StatefulMechanism) or isinstance(mechanism, type):
        raise TypeError(
            "mechanism must be one of dpoptax.mechanisms, such as Gaussian(), or have release, "
            f"check and caveat; got {described(mechanism)}. Leave it out for Gaussian()."
        )


def check_num_steps(num_steps: int, mechanism: AnyMechanism) -> None:
    """Raises if the steps cannot be counted, or if the mechanism does not cover them."""
    if num_steps >= 2**31:
        raise ValueError(
            f"num_steps must be below 2**31, for steps are counted in int32; got {num_steps}."
        )
    last = mechanism.num_steps if isinstance(mechanism, StatefulMechanism) else None
    if last is not None and num_steps > last:
        raise ValueError(
            f"expected a plan of at most {last} steps, because {type(mechanism).__name__} has "
            f"correlated noise for so many; got num_steps={num_steps}. Pass a strategy of "
            f"{num_steps} steps, or plan fewer."
        )


def check_accounted(
    sampler: Sampler,
    clip: AnyClipRule,
    noise_multiplier: ScalarOrSchedule,
    num_steps: int,
    mechanism: AnyMechanism,
) -> None:
    """Raises if nothing is proven about correlated noise under these settings."""
    if strategy_of(mechanism) is not None:
        check_clip(mechanism, clip)
        run_event(sampler, noise_multiplier, num_steps, None, mechanism)


def one_sampler(
    sampler: Sampler | None, num_examples: int | None, expected_batch_size: float | None
) -> Sampler:
    """Returns the sampler, or the Poisson sampler of the two numbers."""
    if sampler is not None and num_examples is None and expected_batch_size is None:
        check_sampler(sampler)
        return sampler
    if sampler is None and num_examples is not None and expected_batch_size is not None:
        return Poisson(num_examples, expected_batch_size)
    raise TypeError(
        "give either sampler, or num_examples and expected_batch_size for Poisson sampling; got "
        f"sampler={described(sampler)}, num_examples={described(num_examples)}, "
        f"expected_batch_size={described(expected_batch_size)}. Leave out what you do not need."
    )


def tabulated(value: Any, num_steps: int) -> Any:
    """Evaluates an Optax schedule at each step; returns anything else as it is."""
    if isinstance(value, ClipRule | StatefulClipRule | type) or not callable(value):
        return value
    return tabulate(value, max(num_steps, 1))


def decoded(content: Mapping[str, Any], classes: tuple[type, ...]) -> dict[str, Any]:
    """Returns the arguments of a plan from a record of its fields."""
    interfaces: dict[str, Any] = {
        "sampler": Sampler,
        "clip": (ClipRule, StatefulClipRule),
        "mechanism": (Mechanism, StatefulMechanism),
    }
    # The other fields are numbers or schedules; the plan validates them.
    return {
        name: _serialize.decode(record, interfaces[name], classes)
        if name in interfaces
        else _serialize.decode_number(record)
        for name, record in content.items()
    }
