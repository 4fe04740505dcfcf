"""Checks of a NumPyro model and guide: what has no private gradient is refused, site by site."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array, PRNGKeyArray, PyTree

from dpoptax.vi.numpyro import _sites as sites

# Examples with missing values that are evaluated together. More are faster and need more memory.
NAN_CHECK_BATCH = 256


def check_latents(model: sites.Trace, guide: sites.Trace) -> None:
    """Refuses a guide whose latents are not those of the model, and discrete latents."""
    latents = {name for name, site in sites.sample_sites(model) if not site["is_observed"]}
    drawn = {
        name
        for name, site in sites.sample_sites(guide)
        if not site["infer"].get("is_auxiliary", False)
    }
    if latents != drawn:
        missing, extra = sorted(latents - drawn), sorted(drawn - latents)
        raise ValueError(
            f"the guide must draw the latent sites of the model; it lacks {missing} and has "
            f"{extra} too many. Give sites the same names in both."
        )
    for name in sorted(latents):
        if model[name]["fn"].support.is_discrete:
            raise ValueError(
                f"site {name!r} is a discrete latent, which has no reparameterised gradient. Sum "
                "over it in the likelihood, as numpyro.distributions.MixtureSameFamily does."
            )


def check_plate_sizes(model: sites.Trace) -> None:
    """Refuses a guide that fixes the size of a plate when it first runs, as autoguides do."""
    for name, site in model.items():
        if site["type"] != "plate":
            continue
        size, subsample_size = site["args"]
        if len(site["value"]) != (subsample_size or size):
            raise ValueError(
                f"the guide keeps one set of latents for plate {name!r}, but every batch holds "
                "other examples. Write a guide that computes them from the example: an encoder. An "
                "autoguide works for latents that all examples share."
            )


def check_observed(model: sites.Trace, plates: Mapping[str, sites.Plate]) -> None:
    """Refuses observed sites outside the plates over the data."""
    for name, site in sites.sample_sites(model):
        if site["is_observed"] and name not in plates:
            raise ValueError(
                f"observed site {name!r} lies in no plate over the data, so it is unknown which "
                "part of it belongs to which example. Put it into numpyro.plate('data', "
                "num_examples, subsample_size=len(x))."
            )


def check_coupling(
    program: sites.Program,
    initial: Mapping[str, PyTree],
    model_plates: Mapping[str, sites.Plate],
    guide_plates: Mapping[str, sites.Plate],
    example: PyTree,
    key: PRNGKeyArray,
) -> None:
    """Refuses sites whose density for one example depends on another example.

    It corrupts the second of two examples. Only the density of the second may change.
    """

    def corrupt_second(leaf: Array) -> Array:
        rows = sites.repeat_example(leaf, 2)
        return rows.at[1].set(jnp.nan if jnp.issubdtype(rows.dtype, jnp.inexact) else 1)

    def trace(args: PyTree) -> sites.Trace:
        model, guide = program.trace(dict(initial), args, key)
        return {f"{name} of the guide": site for name, site in guide.items()} | dict(model)

    plates = {
        **model_plates,
        **{f"{name} of the guide": plate for name, plate in guide_plates.items()},
    }
    # Validation would raise on NaN, which is here on purpose.
    with numpyro.validation_enabled(False):
        clean = trace(sites.repeat_example(example, 2))
        corrupted = trace(jax.tree.map(corrupt_second, example))
        for name, site in sites.sample_sites(clean):
            before, after = (
                sites.log_prob_of_first(one, plates[name])
                if name in plates
                else sites.log_prob(one)
                for one in (site, corrupted[name])
            )
            # A density that is not finite at the stand-in example shows nothing.
            if not jnp.all(jnp.isfinite(before)) or jnp.allclose(before, after, rtol=1e-4):
                continue
            if name in plates:
                raise ValueError(
                    f"site {name!r} couples examples: its density for one depends on another. "
                    "A private gradient needs a density of each example by itself."
                )
            raise ValueError(
                f"site {name!r} lies in no plate over the data, yet its density depends on "
                "the data. Put it into that plate, or make it depend on constants alone."
            )


def check_no_nan(
    program: sites.Program,
    values: Mapping[str, PyTree],
    observed: Mapping[str, sites.Plate],
    data: PyTree,
) -> None:
    """Refuses data that are NaN where the model observes them without a mask."""
    leaves = jax.tree.leaves(data)
    # Inside a transformation of JAX the values are unknown.
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return
    # NumPy, because the number of rows with NaN decides a shape.
    missing = np.zeros(len(leaves[0]), bool)
    for leaf in map(np.asarray, leaves):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            missing |= np.isnan(leaf).reshape(len(leaf), -1).any(axis=1)
    if not missing.any():
        return
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf)[np.flatnonzero(missing)], data)

    # A NaN is fine if the model masks it, so only the density tells.
    def is_nan(example: PyTree) -> dict[str, Array]:
        model, _ = program.trace(values, sites.repeat_example(example), jax.random.key(0))
        return {name: jnp.isnan(sites.log_prob(model[name])) for name in observed}

    with numpyro.validation_enabled(False):
        nan_rows = jax.jit(functools.partial(jax.lax.map, is_nan, batch_size=NAN_CHECK_BATCH))(rows)
    for name, is_nan_row in nan_rows.items():
        if jnp.any(is_nan_row):
            raise ValueError(
                f"data hold NaN, and the density of site {name!r} is NaN there: the example "
                "would contribute nothing. Where x is missing, give the site "
                "obs=jnp.where(observed, x, 0.0) within "
                "numpyro.handlers.mask(mask=observed), observed = ~jnp.isnan(x)."
            )
