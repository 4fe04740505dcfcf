"""Checks of the model and of the arguments of `fit`, each with its remedy."""

from typing import Any

import numpy as np

from dpoptax._pytree import PyTree

_BATCHES = (
    "The sampler of the plan draws the batches: the epsilon of a plan does not hold for shuffled "
    "batches. Pass Plan(sampler=dpoptax.samplers.Poisson(num_examples, expected_batch_size), ...)"
)
_LENGTH = "The plan says how long to train. Set num_steps or epochs there"
_WEIGHTS = (
    "Make the weight a part of y, and multiply by it in a loss of your own, so that it counts "
    "before the clip"
)
# Arguments of `keras.Model.fit` that a private run cannot take.
_REMEDIES = {
    "batch_size": _BATCHES,
    "shuffle": _BATCHES,
    "epochs": _LENGTH,
    "steps_per_epoch": _LENGTH,
    "initial_epoch": "A run continues by make_private(..., resume=folder)",
    "validation_split": "Split the data before, and pass validation_data. The plan counts the "
    "examples that are left",
    "sample_weight": _WEIGHTS,
    "class_weight": _WEIGHTS,
}


def refuse_arguments(others: dict[str, Any]) -> None:
    """Raises for arguments of Keras' `fit` that mean nothing here, or something else."""
    for name in others:
        remedy = _REMEDIES.get(name, "Leave it out")
        raise TypeError(
            "the private fit takes x, y, validation_data, callbacks and verbose; got "
            f"{name}. {remedy}."
        )


def check_model(model: Any) -> None:
    """Raises unless a model is compiled, runs on JAX, and trains as Keras does."""
    keras = import_keras()
    if keras.backend.backend() != "jax":
        raise ValueError(
            f"expected Keras on JAX; got the backend {keras.backend.backend()}. Set the "
            "environment variable KERAS_BACKEND=jax before Keras is imported."
        )
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model; got {type(model).__name__}.")
    if not getattr(model, "compiled", False) or model.optimizer is None:
        raise ValueError(
            "expected a compiled model; got one without optimizer and loss. Call "
            "model.compile(optimizer=..., loss=...) first."
        )
    for name in ("train_step", "compute_loss_and_updates"):
        if getattr(type(model), name) is not getattr(keras.Model, name):
            raise ValueError(
                f"expected the {name} of keras.Model; got {type(model).__name__}, which has its "
                "own. Its gradients are not per example, and it would not run. Override "
                "compute_loss, which returns the loss, or use dpoptax.training.PrivateRun."
            )


def check_data(x: PyTree, y: PyTree) -> PyTree:
    """Returns `(x, y)`, without lists; refuses what is no tree of arrays, such as a generator."""
    import jax

    for leaf in jax.tree.leaves((x, y)):
        if not isinstance(leaf, np.ndarray | jax.Array):
            raise TypeError(
                "x and y must be arrays with one row per example, or lists or dicts of such; got "
                f"{type(leaf).__name__}. A data set that yields batches has drawn them already, "
                "with another guarantee. Pass the arrays, and the plan draws the batches."
            )
    return _with_tuples((x, y))


def _with_tuples(node: PyTree) -> PyTree:
    """Returns the tree with tuples for lists: in Keras a list has an entry per input."""
    if isinstance(node, dict):
        return {name: _with_tuples(part) for name, part in node.items()}
    return tuple(map(_with_tuples, node)) if isinstance(node, list | tuple) else node


def import_keras() -> Any:
    """Returns Keras, or says how to install it."""
    try:
        import keras
    except ImportError as error:
        raise ImportError("dpoptax.keras needs Keras 3: pip install 'dpoptax[keras]'.") from error
    return keras
