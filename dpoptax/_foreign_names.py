"""Argument names of other libraries: an error that says what they are called here."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

OPACUS, TF_PRIVACY, OTHERS = "Opacus", "TensorFlow Privacy", "other libraries"
JAX_PRIVACY, OPTAX = "JAX Privacy", "Optax"

# Name, its library, and what stands for it here. The first one that the function takes is named.
_NAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "max_grad_norm": (OPACUS, ("clip",)),
    "l2_norm_clip": (f"{TF_PRIVACY} and {OPTAX}", ("clip",)),
    "l2_clip_norm": (JAX_PRIVACY, ("clip",)),
    "clip_norm": (JAX_PRIVACY, ("clip",)),
    "clipping_norm": (JAX_PRIVACY, ("clip",)),
    "max_norm": (OTHERS, ("clip",)),
    "l2_clip": ("dpoptax.clipping.FlatClip", ("clip",)),
    "target_epsilon": (OPACUS, ("epsilon",)),
    "target_delta": (OPACUS, ("delta",)),
    "target_eps": (TF_PRIVACY, ("epsilon",)),
    "eps": (OTHERS, ("epsilon",)),
    "noise_scale": (OTHERS, ("noise_multiplier",)),
    "noise_std": (OTHERS, ("noise_multiplier",)),
    "sigma": (OTHERS, ("noise_multiplier",)),
    "sample_rate": (OPACUS, ("expected_batch_size", "sampler", "sampling_rate")),
    "sampling_probability": (TF_PRIVACY, ("expected_batch_size", "sampler", "sampling_rate")),
    "sampling_prob": (JAX_PRIVACY, ("expected_batch_size", "sampler", "sampling_rate")),
    "sampling_rate": (OTHERS, ("expected_batch_size", "sampler")),
    "q": (OTHERS, ("expected_batch_size", "sampler", "sampling_rate")),
    "batch_size": (OTHERS, ("expected_batch_size", "sampler", "steps_per_round")),
    "expected_batch_size": ("dpoptax.samplers.Poisson", ("sampler", "steps_per_round")),
    "normalize_by": (JAX_PRIVACY, ("expected_batch_size",)),
    "poisson_sampling": (OPACUS, ("sampler",)),
    "max_physical_batch_size": (OPACUS, ("microbatch_size",)),
    "num_microbatches": (TF_PRIVACY, ("microbatch_size",)),
    "sample_size": (OPACUS, ("num_examples", "sampler")),
    "number_of_examples": (TF_PRIVACY, ("num_examples", "sampler")),
    "num_samples": (JAX_PRIVACY, ("num_examples", "sampler")),
    "dataset_size": (OTHERS, ("num_examples", "sampler")),
    "n": (OTHERS, ("num_examples", "sampler")),
    "num_epochs": (TF_PRIVACY, ("epochs",)),
    "steps": (OPACUS, ("num_steps",)),
    "num_iterations": (OTHERS, ("num_steps",)),
    "num_updates": (JAX_PRIVACY, ("num_steps",)),
    "seed": (OPTAX, ("key",)),
    "rng": (OTHERS, ("key",)),
    "rng_key": (OTHERS, ("key",)),
    "prng_key": (JAX_PRIVACY, ("key",)),
    "secure_mode": (OPACUS, ("key",)),
    "noise_generator": (OPACUS, ("key",)),
    "lr": (OTHERS, ("learning_rate", "optimizer")),
    "learning_rate": ("dpoptax.dp_sgd", ("optimizer", "tx")),
    "module": (OPACUS, ("params",)),
    "model": (OTHERS, ("params",)),
    "data_loader": (OPACUS, ("data",)),
    "dataset": (OTHERS, ("data",)),
    "criterion": (OPACUS, ("loss_fn",)),
    "loss": (OTHERS, ("loss_fn",)),
    "tx": (OTHERS, ("optimizer",)),
    "optimizer": ("dpoptax.training.fit", ("tx",)),
    "callback": (OTHERS, ("progress",)),
}
# What to write, where more than the name differs.
_RATE = "expected_batch_size=rate * num_examples, a number of examples"
_REMEDIES = {
    "clip": "clip=bound, the bound on the norm of one example's gradient",
    "noise_multiplier": (
        "noise_multiplier=, the standard deviation of the noise on the sum divided by clip"
    ),
    "sampler": "sampler=dpoptax.samplers.Poisson(num_examples, expected_batch_size)",
    "steps_per_round": "steps_per_round=num_examples // batch_size, the steps of one epoch",
    "key": "key=jax.random.key(seed), or dpoptax.random.secure_key() for secret noise",
    "data": "data= arrays, or HostData(source) with random access",
    "optimizer": "optimizer=optax.sgd(learning_rate), or another optimizer of Optax",
    "tx": "tx=optax.chain(plan.privatize(key), optax.sgd(learning_rate))",
    "params": "params=, a tree of arrays, and a loss of one example",
}
# Arguments of a plan, for functions that take the plan.
_OF_A_PLAN = {
    *("sampler", "clip", "noise_multiplier", "num_steps", "epochs", "epsilon", "delta"),
    *("expected_batch_size", "num_examples", "mechanism"),
}


def answer_foreign_names(function: Function) -> Function:
    """Makes a function answer an unknown argument with what it is called here.

    The signature stays as it is, for editors and type checkers.
    """
    signature = inspect.signature(function)
    known = signature.parameters

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        called = function.__qualname__
        if called.endswith(".__init__") and args:
            called = type(args[0]).__name__  # samplers share a constructor
        for name in kwargs:
            if name not in known:
                raise TypeError(_answer(called, name, known))
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            hint = " Pass arguments by name." if "positional" in str(error) else _unpack(args)
            raise TypeError(f"{called}: {error}. {_takes(known)}{hint}") from None
        return function(*args, **kwargs)

    return cast(Function, checked)


def _answer(function: str, name: str, known: Iterable[str]) -> str:
    names = _names(known)
    called = function.removesuffix(".__init__")
    library, candidates = _NAMES.get(name, ("", (name,)))
    expected = f"{called} has no argument {name!r}{f', a name in {library}' if library else ''}."
    for ours in candidates:
        if ours in names:
            is_rate = ours == "expected_batch_size" and name != "batch_size"
            remedy = _RATE if is_rate else _REMEDIES.get(ours)
            return f"{expected} Pass {ours}=..." if remedy is None else f"{expected} Pass {remedy}."
    # A budget belongs to a calibration, which returns the plan that keeps it.
    if called == "Plan" and "epsilon" in candidates:
        return f"{expected} For a budget, call dpoptax.Plan.calibrate(epsilon=..., delta=..., ...)."
    if called == "Plan" and "sampler" in names and name in ("num_examples", "expected_batch_size"):
        return f"{expected} Pass {_REMEDIES['sampler']}."
    if "plan" in names and not _OF_A_PLAN.isdisjoint(candidates):
        return f"{expected} It belongs to the plan: pass plan=dpoptax.Plan(...)."
    close = difflib.get_close_matches(name, names, 1)
    meant = f" Did you mean {close[0]}?" if close else ""
    return f"{expected}{meant} {_takes(known)}"


def _names(known: Iterable[str]) -> list[str]:
    return [name for name in known if name not in ("self", "cls")]


def _takes(known: Iterable[str]) -> str:
    return f"It takes {', '.join(_names(known))}."


def _unpack(args: tuple[Any, ...]) -> str:
    """A hint for a pair of loss and parameters in the place of two arguments."""
    pairs = [arg for arg in args if isinstance(arg, tuple) and arg and callable(arg[0])]
    if not pairs:
        return ""
    return " For the pair that dpoptax.nnx.loss_fn returns, write loss, params = ... first."
