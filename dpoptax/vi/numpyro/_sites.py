"""A NumPyro model and guide in, the sites of their traces out, with what each is multiplied by.

What no private gradient can be had of is refused here, site by site, with a remedy.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree
from numpyro import handlers
from numpyro.distributions import biject_to, constraints

Trace = Mapping[str, Mapping[str, Any]]


class Plate(NamedTuple):
    """A plate over the data, and what it multiplies the log density of one example by."""

    name: str
    scale: float


def trace_both(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    values: Mapping[str, PyTree],
    args: Any,
    kwargs: Mapping[str, Any],
    key: PRNGKeyArray,
) -> tuple[Trace, Trace]:
    """Traces the guide, and the model with the latents that the guide drew."""
    guide_key, model_key = jax.random.split(key)
    seeded = handlers.substitute(handlers.seed(guide, guide_key), data=values)
    guide_trace = handlers.trace(seeded).get_trace(*args, **kwargs)
    params = {name: site["value"] for name, site in guide_trace.items() if site["type"] == "param"}
    replayed = handlers.replay(handlers.seed(model, model_key), guide_trace)
    substituted = handlers.substitute(replayed, data={**params, **values})
    return handlers.trace(substituted).get_trace(*args, **kwargs), guide_trace


def repeated(example: PyTree, size: int = 1) -> PyTree:
    """A batch that holds one example `size` times."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (size, *leaf.shape)), example)


def sample_sites(trace: Trace) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The sites that draw or observe, by name."""
    return ((name, site) for name, site in trace.items() if site["type"] == "sample")


def scaled(value: Array, site: Mapping[str, Any]) -> Array:
    """A log density times what the plates around its site scale it by."""
    return value if site["scale"] is None else site["scale"] * value


def log_prob(site: Mapping[str, Any]) -> Array:
    """The scaled log density of a site, summed over all that it holds."""
    if site["intermediates"]:
        found = site["fn"].log_prob(site["value"], site["intermediates"])
    else:
        found = site["fn"].log_prob(site["value"])
    return scaled(jnp.sum(found), site)


def parameters(traces: list[Trace]) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """Initial values of the parameters, and the bijections that make them; the last trace wins."""
    initial, transforms = {}, {}
    for trace in traces:
        for name, site in trace.items():
            if site["type"] == "param":
                transforms[name] = biject_to(site["kwargs"].get("constraint", constraints.real))
                # A module's is a tree.
                initial[name] = jax.tree.map(
                    lambda value: jnp.asarray(value, jnp.result_type(value, float)), site["value"]
                )
            elif site["type"] == "mutable":
                raise ValueError(
                    f"site {name!r} is mutable state: updating it from data is not private. Use "
                    "a module without it."
                )
    return initial, transforms


def check_sites(model: Trace, guide: Trace) -> None:
    """Refuses a guide of other latents than the model, and discrete ones."""
    latents = {name for name, site in sample_sites(model) if not site["is_observed"]}
    drawn = {
        name for name, site in sample_sites(guide) if not site["infer"].get("is_auxiliary", False)
    }
    if latents != drawn:
        lacking, beyond = sorted(latents - drawn), sorted(drawn - latents)
        raise ValueError(
            f"the guide must draw the latent sites of the model; it lacks {lacking} and has "
            f"{beyond} too many. Give sites the same names in both."
        )
    for name in sorted(latents):
        if model[name]["fn"].support.is_discrete:
            raise ValueError(
                f"site {name!r} is a discrete latent, which has no reparameterised gradient. Sum "
                "over it in the likelihood, as numpyro.distributions.MixtureSameFamily does."
            )


def plates_of_data(one: Trace, two: Trace, num_examples: int) -> dict[str, Plate]:
    """By site inside it: the plate that grows with the batch."""
    plates: dict[str, Plate] = {}
    for name, site in sample_sites(one):
        sizes = {frame.name: frame.size for frame in site["cond_indep_stack"]}
        grown = [
            frame.name
            for frame in two[name]["cond_indep_stack"]
            if frame.size != sizes.get(frame.name)
        ]
        if not grown:
            continue
        full = [float(one[plate]["args"][0]) for plate in grown]
        # plate(len(x)) has the size of the batch, plate(N, subsample_size=len(x)) that of the data.
        if len(grown) > 1 or full[0] not in (1.0, float(num_examples)):
            raise ValueError(
                f"site {name!r} lies in the plate(s) over the data {grown} of size(s) "
                f"{[int(size) for size in full]}; expected one, of size {num_examples}, the number "
                f"of examples: plate({grown[0]!r}, {num_examples}, subsample_size=len(x))."
            )
        plates[name] = Plate(grown[0], full[0])
    return plates


def check_plates(model: Trace) -> None:
    """Refuses a guide that fixed the size of a plate when it first ran, as autoguides do."""
    for name, site in model.items():
        if site["type"] != "plate":
            continue
        size, subsample_size = site["args"]
        if len(site["value"]) != (subsample_size or size):
            raise ValueError(
                f"the guide gives the latents in plate {name!r} places of their own, once and for "
                "all, where batches bring other examples. Write a guide that computes them from "
                "the example: an encoder. An autoguide serves what all examples share."
            )


def check_observed(model: Trace, plates: Mapping[str, Plate]) -> None:
    """Refuses what is observed outside the plates over the data."""
    for name, site in sample_sites(model):
        if site["is_observed"] and name not in plates:
            raise ValueError(
                f"observed site {name!r} lies in no plate over the data, so nobody can tell which "
                "part of it belongs to which example. Put it into numpyro.plate('data', "
                "num_examples, subsample_size=len(x))."
            )


def first_example(site: Mapping[str, Any], plate: Plate) -> Array:
    """The log density of the first of two examples, whichever axis their plate has."""
    found = jnp.asarray(site["fn"].log_prob(site["value"]))
    (frame,) = (frame for frame in site["cond_indep_stack"] if frame.name == plate.name)
    return jnp.take(found, 0, axis=frame.dim)
