"""Traces of a NumPyro model and guide: their sites, log densities and parameters."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import attrs
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from numpyro import handlers
from numpyro.distributions import ImproperUniform, MaskedDistribution, biject_to, constraints

from dpoptax._pytree import PyTree
from dpoptax.vi.numpyro._batch_handler import BatchHandler

# By name of the site, NumPyro's record of it.
Site = Mapping[str, Any]
Trace = Mapping[str, Site]

_SIMPLEX_TOLERANCE = 1e-3


class Plate(NamedTuple):
    """A plate over the data, and the factor by which it scales the log density of one example."""

    name: str
    scale: float


@attrs.frozen(eq=False)
class Program:
    """A model and its guide, with the arguments that are the same for all examples.

    Attributes:
        model: the model.
        guide: the guide.
        kwargs: arguments that are the same for all examples.
        data_names: names of the last arguments, which are passed by keyword.
        plates: names of the plates over the data.
        indices: the indices in these plates; by default those of the rows of a batch.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    kwargs: Mapping[str, Any]
    data_names: tuple[str, ...] = ()
    plates: frozenset[str] = frozenset()
    indices: Array | None = None

    def model_trace(self, values: Mapping[str, PyTree], args: Any, key: PRNGKeyArray) -> Any:
        """Returns the trace of the model by itself: it draws its own latents."""
        seeded = handlers.substitute(handlers.seed(self.model, key), substitute_fn=_feasible)
        return self._run(handlers.substitute(seeded, data=values), args)

    def guide_trace(self, values: Mapping[str, PyTree], args: Any, key: PRNGKeyArray) -> Any:
        """Returns the trace of the guide."""
        return self._run(handlers.substitute(handlers.seed(self.guide, key), data=values), args)

    def trace(self, values: Mapping[str, PyTree], args: Any, key: PRNGKeyArray) -> tuple[Any, Any]:
        """Returns the traces of model and guide; the model uses the latents of the guide."""
        guide_key, model_key = jax.random.split(key)
        guide_trace = self.guide_trace(values, args, guide_key)
        params = {
            name: site["value"] for name, site in guide_trace.items() if site["type"] == "param"
        }
        replayed = handlers.replay(handlers.seed(self.model, model_key), guide_trace)
        return self._run(handlers.substitute(replayed, data={**params, **values}), args), (
            guide_trace
        )

    def _run(self, function: Callable[..., Any], args: Any) -> Any:
        split = len(args) - len(self.data_names)
        named = dict(zip(self.data_names, args[split:], strict=True))
        rows = jnp.arange(jax.tree.leaves(args)[0].shape[0])
        indices = rows if self.indices is None else self.indices
        # The trace is outermost, so it records what the other handlers made of a site.
        handled = handlers.trace(BatchHandler(function, self.plates, indices))
        return handled.get_trace(*args[:split], **named, **self.kwargs)


def _feasible(site: Site) -> Array | None:
    """Returns a value for a latent with an improper prior, which cannot be drawn."""
    if site["type"] != "sample" or not isinstance(site["fn"], ImproperUniform):
        return None
    value: Array = site["fn"].support.feasible_like(jnp.zeros(site["fn"].shape()))
    return value


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
    # Not the sum times the scale, which may differ between examples.
    return jnp.sum(scaled(densities, site))


def log_prob_by_example(site: Site, plate: Plate) -> Array:
    """Returns the scaled log density of each example, by its row along the plate."""
    densities = scaled(jnp.asarray(site["fn"].log_prob(site["value"])), site)
    (frame,) = (frame for frame in site["cond_indep_stack"] if frame.name == plate.name)
    return jnp.moveaxis(densities, frame.dim, 0)


def has_support(site: Site) -> bool:
    """Whether a site is observed, and some number may lie outside its support."""
    # A density on the circle is periodic, so an angle beyond it is one inside.
    everywhere = (None, constraints.real, constraints.circular, constraints.dependent)
    auxiliary = site["infer"].get("is_auxiliary", False)
    support = base_support(site["fn"].support)
    return site["is_observed"] and not auxiliary and all(support is not one for one in everywhere)


def base_support(support: Any) -> Any:
    """Returns a support without the event axes that are added to it."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def in_support(site: Site) -> Array:
    """Whether each entry lies in the support of its distribution, or is masked.

    Shares sum to one up to the rounding of 32 bits, which NumPyro's own check is too strict for.
    """
    value = jnp.asarray(site["value"])
    support = site["fn"].support
    inside = jnp.asarray(support(value))
    if base_support(support) is constraints.simplex:
        sums = jnp.abs(value.sum(-1) - 1) < _SIMPLEX_TOLERANCE
        inside = jnp.all(value >= 0, axis=-1) & sums
        rest = support.event_dim - 1
        inside = jnp.all(inside, axis=tuple(range(inside.ndim - rest, inside.ndim)))
    if not _is_masked(site["fn"]):
        return inside
    # The log density of a masked entry is exactly zero.
    return inside | (jnp.asarray(site["fn"].log_prob(value)) == 0)


def _is_masked(fn: Any) -> bool:
    while not isinstance(fn, MaskedDistribution) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, MaskedDistribution)


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
