"""From a NumPyro model and guide to a program whose structure is known and sound."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import attrs
import jax
import jax.numpy as jnp
import numpyro
from jaxtyping import Array, PRNGKeyArray

from dpoptax._pytree import PyTree
from dpoptax.vi.numpyro import _checks
from dpoptax.vi.numpyro import _sites as sites
from dpoptax.vi.numpyro._stand_in import neutral_example, sites_outside_support, stand_in_examples
from dpoptax.vi.numpyro._structure import (
    SIZES,
    Structure,
    data_plates,
    guide_structure,
    model_structure,
    site_shapes,
)

# That many rows are compared, to tell rows of an array from one constant.
_MAX_ROWS = 4096


class Prepared(NamedTuple):
    """A program, its parameters, and where its sites belong."""

    program: sites.Program
    example: PyTree
    initial: Mapping[str, PyTree]
    transforms: Mapping[str, Any]
    model_plates: Mapping[str, sites.Plate]
    guide_plates: Mapping[str, sites.Plate]
    scale: float


def prepare(program: sites.Program, args: PyTree, num_examples: int, key: PRNGKeyArray) -> Prepared:
    """Runs all checks that need no data, in their order."""
    _checks.check_guide_class(program.guide)
    program, model = _with_batch_plates(program, neutral_example(args), num_examples, key)
    _checks.check_sites_are_fixed(model)
    _checks.check_latents(model)
    _checks.check_parameters(model)
    model_plates = data_plates(model, num_examples)
    _checks.check_observed(model, model_plates)
    program = attrs.evolve(program, plates=frozenset(plate.name for plate in model_plates.values()))
    example, (model_one, guide_one) = _first_traces(program, args, key)
    _checks.check_autoguides(program.guide, model_plates)
    initial, transforms = sites.parameters([model_one, guide_one])
    guide = guide_structure(program, initial, example, key)
    _checks.check_sites_are_fixed(guide)
    _checks.check_parameters(guide)
    _checks.check_same_latents(model, guide)
    guide_plates = data_plates(guide, num_examples)
    _checks.check_initial_values(program, initial, example, key)
    plates = {
        **model_plates,
        **{f"{name} of the guide": plate for name, plate in guide_plates.items()},
    }
    _checks.check_coupling(program, initial, plates, example, key)
    moved = {name: _moved(transforms[name], value, key) for name, value in initial.items()}
    _check_indices(program, moved, plates, example, num_examples, key)
    scale = _common_scale(model, model_plates, guide, guide_plates)
    return Prepared(program, example, initial, transforms, model_plates, guide_plates, scale)


def _with_batch_plates(
    program: sites.Program, example: PyTree, num_examples: int, key: PRNGKeyArray
) -> tuple[sites.Program, Structure]:
    """Returns the program whose plates over the data follow the batch, and its model's structure.

    A plate of size N without a subsample size, or with one of the model's own, does not grow with
    the batch. If observed sites lie in no other plate, that is the one over the data.
    """
    alone = site_shapes(program.model_trace, example, 1, key)
    error = None
    try:
        model = Structure((alone, *(site_shapes(program.model_trace, example, size, key)
                                    for size in SIZES[1:])))  # fmt: skip
    except (TypeError, ValueError) as caught:
        error = caught
    fixed = frozenset(
        plate
        for name, site in alone.items()
        if site.is_observed and (error is not None or not model.growing_frames(name))
        for plate, frame in site.frames.items()
        if frame.full == num_examples
    )
    if error is None and not fixed:
        return program, model
    if fixed:
        program = attrs.evolve(program, plates=fixed)
        try:
            return program, model_structure(program, example, key)
        except (TypeError, ValueError) as caught:
            error = error or caught
    raise ValueError(
        "the model runs for one example, but not for a batch of two. The arguments of the model "
        "are the batch: arrays with a leading axis of examples, in numpyro.plate('data', "
        f"{num_examples}, subsample_size=len(x)). The error was: {error}"
    ) from error


def _first_traces(
    program: sites.Program, args: PyTree, key: PRNGKeyArray
) -> tuple[PyTree, tuple[sites.Trace, sites.Trace]]:
    """Returns an example, and the traces of model and guide; an autoguide sets itself up."""
    error = None
    for example in stand_in_examples(program, args, key):
        try:
            return example, program.trace({}, sites.repeat_example(example), key)
        except (RuntimeError, ValueError) as caught:
            # NumPyro's words for a bad density, and for a bad parameter of a distribution.
            known = ("valid initial parameters", "distribution got invalid")
            if not any(words in str(caught) for words in known):
                raise
            error = caught
        except TypeError as caught:
            if "indices must be of integer type" not in str(caught):
                raise
            raise TypeError(
                "class labels are floats, but a categorical distribution uses them as "
                "indices. Pass integers: y.astype(int)."
            ) from caught
    with numpyro.validation_enabled(False):
        outside = sorted(sites_outside_support(program, neutral_example(args), key))
    where = f" The observed sites {outside} are outside their support there." * bool(outside)
    raise ValueError(
        "density and gradient of the model are not finite for an example without data: numbers "
        f"are 0.5, 0 or 1 where the supports allow it.{where} Pass columns as the model observes "
        "them, for example labels 0 and 1, and transform them before. Standardise before, too, "
        "with public numbers: a batch has statistics of private data. An autoguide may also need "
        "init_loc_fn=numpyro.infer.init_to_value(values=...) with public values."
    ) from error


def _common_scale(
    model: Structure,
    model_plates: Mapping[str, sites.Plate],
    guide: Structure,
    guide_plates: Mapping[str, sites.Plate],
) -> float:
    """Returns the constant factor of `handlers.scale` that the terms of an example share.

    The gradient of an example is clipped without it: with it, a scale of 1 / N would shrink the
    gradients of all examples below the noise.
    """
    scales = [model.shapes[0][name].extra_scale for name in model_plates]
    scales += [guide.shapes[0][name].extra_scale for name in guide_plates]
    known = [scale for scale in scales if scale is not None]
    # A scale that is not constant, such as a weight of each example, stays in the density.
    return max(known) if known and len(known) == len(scales) else 1.0


def _moved(transform: Any, value: PyTree, key: PRNGKeyArray) -> PyTree:
    """Returns a parameter whose entries all differ, so that rows of it can be told apart."""
    free = transform.inv(value)
    return transform(
        jax.tree.map(
            lambda leaf: leaf + 0.01 * jax.random.normal(key, leaf.shape, leaf.dtype), free
        )
    )


def _check_indices(
    program: sites.Program,
    initial: Mapping[str, PyTree],
    plates: Mapping[str, sites.Plate],
    example: PyTree,
    num_examples: int,
    key: PRNGKeyArray,
) -> None:
    """Refuses a model that reads rows of other arrays by the indices of a plate over the data."""
    rows = min(num_examples, _MAX_ROWS)
    batch = sites.repeat_example(example, rows)

    def densities(indices: Array) -> dict[str, Array]:
        indexed = attrs.evolve(program, indices=indices)
        model, guide = indexed.trace(dict(initial), batch, key)
        named = {f"{name} of the guide": site for name, site in guide.items()} | dict(model)
        return {name: site["fn"].log_prob(site["value"]) for name, site in named.items()
                if name in plates}  # fmt: skip

    forward = jnp.arange(rows)
    with numpyro.validation_enabled(False):
        jaxpr = jax.make_jaxpr(densities)(forward).jaxpr
        if not any(var is jaxpr.invars[0] for eqn in jaxpr.eqns for var in eqn.invars):
            return
        run = jax.jit(densities)
        one, other = run(forward), run(num_examples - 1 - forward)
    for name, density in one.items():
        # All examples are equal here, so the indices alone can make a difference.
        if not jnp.array_equal(density, other[name], equal_nan=True):
            raise ValueError(
                f"site {name!r} reads rows of an array by the indices of the plate "
                f"{plates[name].name!r}. The array is not an argument, so it is not private. The "
                "arguments are the batch already: pass every column as an argument of the model. "
                "A parameter of each example is private data; compute it from the example."
            )
