"""Traces of a NumPyro model and guide: their sites, log densities and plates over the data."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree
from numpyro import handlers
from numpyro.distributions import biject_to, constraints

# By name of the site, NumPyro's record of it.
Site = Mapping[str, Any]
Trace = Mapping[str, Site]


class Plate(NamedTuple):
    """A plate over the data, and the factor by which it scales the log density of one example."""

    name: str
    scale: float


class Program(NamedTuple):
    """A model and its guide, with the arguments that are the same for all examples."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    kwargs: Mapping[str, Any]

    def trace(self, values: Mapping[str, PyTree], args: Any, key: PRNGKeyArray) -> tuple[Any, Any]:
        """Returns the traces of model and guide; the model uses the latents of the guide."""
        guide_key, model_key = jax.random.split(key)
        seeded = handlers.substitute(handlers.seed(self.guide, guide_key), data=values)
        guide_trace = handlers.trace(seeded).get_trace(*args, **self.kwargs)
        params = {
            name: site["value"] for name, site in guide_trace.items() if site["type"] == "param"
        }
        replayed = handlers.replay(handlers.seed(self.model, model_key), guide_trace)
        substituted = handlers.substitute(replayed, data={**params, **values})
        return handlers.trace(substituted).get_trace(*args, **self.kwargs), guide_trace


def repeat_example(example: PyTree, size: int = 1) -> PyTree:
    """Returns a batch that holds one example `size` times."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (size, *leaf.shape)), example)


def sample_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Yields the sites that draw or observe, by name."""
    return ((name, site) for name, site in trace.items() if site["type"] == "sample")


def scaled(value: Array, site: Site) -> Array:
    """Returns a log density times the scale of the plates around its site."""
    return value if site["scale"] is None else site["scale"] * value


def log_prob(site: Site) -> Array:
    """Returns the scaled log density of a site, summed over all its entries."""
    if site["intermediates"]:
        densities = site["fn"].log_prob(site["value"], site["intermediates"])
    else:
        densities = site["fn"].log_prob(site["value"])
    return scaled(jnp.sum(densities), site)


def log_prob_of_first(site: Site, plate: Plate) -> Array:
    """Returns the log density of the first example, on whichever axis the plate lies."""
    densities = jnp.asarray(site["fn"].log_prob(site["value"]))
    (frame,) = (frame for frame in site["cond_indep_stack"] if frame.name == plate.name)
    return jnp.take(densities, 0, axis=frame.dim)


def parameters(traces: list[Trace]) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """Returns initial parameters and the bijections onto their supports; the last trace wins."""
    initial, transforms = {}, {}
    for trace in traces:
        for name, site in trace.items():
            if site["type"] == "param":
                transforms[name] = biject_to(site["kwargs"].get("constraint", constraints.real))
                # The parameters of a Flax module are one site, with a tree for its value.
                initial[name] = jax.tree.map(
                    lambda value: jnp.asarray(value, jnp.result_type(value, float)), site["value"]
                )
            elif site["type"] == "mutable":
                raise ValueError(
                    f"site {name!r} is mutable state: updating it from data is not private. Use "
                    "a module without it."
                )
    return initial, transforms


def data_plates(one: Trace, two: Trace, num_examples: int) -> dict[str, Plate]:
    """Returns the plate over the data of each site that lies in one.

    `one` and `two` are traces with one and with two examples: the plates that grow are over the
    data.
    """
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
        # plate(len(x)) has the size of the batch, here 1; plate(N, subsample_size=len(x)) has N.
        if len(grown) > 1 or full[0] not in (1.0, float(num_examples)):
            raise ValueError(
                f"site {name!r} lies in the plate(s) over the data {grown} of size(s) "
                f"{[int(size) for size in full]}; expected one, of size {num_examples}, the number "
                f"of examples: plate({grown[0]!r}, {num_examples}, subsample_size=len(x))."
            )
        plates[name] = Plate(grown[0], full[0])
    return plates
