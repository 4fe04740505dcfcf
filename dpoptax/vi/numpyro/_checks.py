"""Checks of a NumPyro model and guide: what has no private gradient is refused, site by site.

The order matters: each check relies on the ones before it.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jaxtyping import Array, PRNGKeyArray
from numpyro.infer import autoguide

from dpoptax._pytree import PyTree
from dpoptax.vi.numpyro import _sites as sites
from dpoptax.vi.numpyro._structure import Structure

# Their posterior reads the density of the model at the arguments of their first call.
_EVALUATES_MODEL = (
    autoguide.AutoLaplaceApproximation,
    autoguide.AutoDAIS,
    autoguide.AutoSemiDAIS,
    autoguide.AutoSurrogateLikelihoodDAIS,
)
# Examples of which one is corrupted. A lag of fewer rows is seen.
_ROWS = 4
_OF_GUIDE = " of the guide"
_ENCODER = (
    "Write a guide that computes them from the example: an encoder. An autoguide works for latents "
    "that all examples share."
)


def _parts(guide: Any) -> Iterator[Any]:
    """Yields the guides that a guide consists of, without the handlers around them."""
    while isinstance(guide, numpyro.primitives.Messenger) and guide.fn is not None:
        guide = guide.fn
    if isinstance(guide, autoguide.AutoGuideList):
        # NumPyro has no public name for them; a test has such a list.
        for part in guide._guides:
            yield from _parts(part)
    else:
        yield guide


def check_guide_class(guide: Callable[..., Any]) -> None:
    """Refuses guides that evaluate the density of the model by themselves."""
    for part in _parts(guide):
        if isinstance(part, _EVALUATES_MODEL):
            raise ValueError(
                f"{type(part).__name__} computes its posterior from the density of the model at "
                "the data it is set up with. Here that is no data, so the posterior would be "
                "wrong; with data it would not be private. Use AutoMultivariateNormal or "
                "AutoNormal."
            )


def check_autoguides(guide: Callable[..., Any], plates: Mapping[str, sites.Plate]) -> None:
    """Refuses an autoguide of latents in a plate over the data, whose parameters it would keep."""
    for part in _parts(guide):
        if not isinstance(part, autoguide.AutoGuide):
            continue
        for name, site in sites.sample_sites(part.prototype_trace):
            if name in plates and not site["is_observed"]:
                raise ValueError(_one_set(name, plates[name].name))


def _one_set(name: str, plate: str) -> str:
    return (
        f"the guide keeps one set of latents {name!r} for plate {plate!r}, but every batch holds "
        f"other examples. {_ENCODER}"
    )


def check_sites_are_fixed(model: Structure) -> None:
    """Refuses a model whose sites, or the shapes of its parameters, follow the batch."""
    first, *others = (set(by_name) for by_name in model.shapes)
    changing = sorted(set().union(*(first ^ names for names in others)))
    if changing:
        raise ValueError(
            f"the sites {changing} exist for some numbers of examples only. Sites made in a loop "
            "over examples cannot be told apart; put one site into numpyro.plate('data', "
            "num_examples, subsample_size=len(x))."
        )


def check_latents(model: Structure) -> None:
    """Refuses discrete latents, and latents as many as examples that belong to no plate."""
    for name, site in model.samples():
        if not site.is_latent:
            continue
        if site.is_discrete:
            raise ValueError(
                f"site {name!r} is a discrete latent, which has no reparameterised gradient. Sum "
                "over it in the likelihood, as numpyro.distributions.MixtureSameFamily does."
            )
        if model.grows(name) and not model.growing_frames(name):
            raise ValueError(
                f"the latent site {name!r} grows with the number of examples, but lies in no plate "
                "over the data, so it is unknown which part belongs to which example. Put latents "
                "of examples into numpyro.plate('data', num_examples, subsample_size=len(x)). "
                f"{_ENCODER} A random walk over rows couples them: let one example be a "
                "whole series."
            )


def check_parameters(structure: Structure) -> None:
    """Refuses parameters as many as examples: each would be private data of one of them."""
    for name, site in structure.shapes[0].items():
        if site.kind == "param" and structure.grows(name):
            raise ValueError(
                f"the parameter {name!r} grows with the number of examples. A parameter is shared "
                "by all examples. Compute what differs between them from the example: an encoder."
            )


def check_same_latents(model: Structure, guide: Structure) -> None:
    """Refuses a guide whose latents are not those of the model, with the same shapes."""
    latents = {name for name, site in model.samples() if site.is_latent}
    drawn = {name for name, site in guide.samples() if not site.is_auxiliary}
    if latents != drawn:
        missing, extra = sorted(latents - drawn), sorted(drawn - latents)
        raise ValueError(
            f"the guide must draw the latent sites of the model; it lacks {missing} and has "
            f"{extra} too many. Give sites the same names in both."
        )
    for name in sorted(latents):
        plates = model.growing_frames(name)
        if plates and not guide.grows(name):
            raise ValueError(_one_set(name, plates[0]))


def check_observed(model: Structure, plates: Mapping[str, sites.Plate]) -> None:
    """Refuses observed sites outside the plates over the data, with the cause."""
    plate = "numpyro.plate('data', num_examples, subsample_size=len(x))"
    for name, site in model.samples():
        if not site.is_observed:
            continue
        if name in plates:
            _check_one_axis(name, model)
            continue
        start = (
            f"observed site {name!r} lies in no plate over the data, so it is unknown which part "
            "of it belongs to which example"
        )
        if model.grows(name, "event_shape") and site.distribution.endswith(".to_event"):
            raise ValueError(f"{start}: to_event joins the examples. Put it into {plate} instead.")
        if model.grows(name, "event_shape"):
            raise ValueError(
                f"observed site {name!r} has one joint density of all examples, "
                f"{site.distribution}. A private gradient needs the density of each example given "
                "latents that all share. For a Gaussian process use numpyro.contrib.hsgp; for a "
                "series let one example be a whole series."
            )
        if not model.grows(name) and not site.is_auxiliary:
            raise ValueError(
                f"{start}. It has as many observations whatever the batch is: the model reads "
                "data that are not its arguments. Pass all data as arguments, and put the site "
                f"into {plate}."
            )
        raise ValueError(f"{start}. Put it into {plate}.")


def _check_one_axis(name: str, model: Structure) -> None:
    """Refuses observations that do not have one row for each example, like their distribution."""
    one, two = (by_name[name] for by_name in model.shapes[:2])
    shapes = [site.shape[: len(site.shape) - len(site.event_shape)] for site in (one, two)]
    pairs = list(zip(reversed(shapes[1]), reversed(two.batch_shape), strict=False))
    if shapes[0] == shapes[1] and any(rows not in (1, size) for rows, size in pairs):
        raise ValueError(
            f"observed site {name!r} has as many observations whatever the batch is: the model "
            "reads data that are not its arguments. Pass all data as arguments."
        )
    for before, after in [(one.batch_shape, two.batch_shape), tuple(shapes)]:
        axes = zip(reversed(before), reversed(after), strict=False)
        if sum(a != b for a, b in axes) > 1 or len(before) != len(after):
            raise ValueError(
                f"site {name!r} couples examples: with two examples its distribution has shape "
                f"{two.batch_shape + two.event_shape} and its observations have shape "
                f"{two.shape}, one entry for each pair. An array of shape (N, 1) met one of shape "
                "(N,). Give both one shape, for example by x[:, 0]."
            )


def check_initial_values(
    program: sites.Program,
    initial: Mapping[str, PyTree],
    example: PyTree,
    key: PRNGKeyArray,
) -> None:
    """Refuses parameters that start at a value computed from the arguments."""
    other = jax.tree.map(
        lambda leaf: leaf / 2 if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf, example
    )

    def initial_at(example: PyTree) -> dict[str, PyTree]:
        return sites.parameters([*program.trace({}, sites.repeat_example(example), key)])[0]

    with numpyro.validation_enabled(False):
        again = initial_at(other)
        changed = [name for name, value in initial.items() if not _all_equal(value, again[name])]
        # An autoguide sets itself up in its first trace, which takes keys: later draws differ.
        once_more = initial_at(example) if changed else again
    for name in changed:
        if not _all_equal(once_more[name], again[name]):
            raise ValueError(
                f"the parameter {name!r} starts at a value that is computed from the data. That "
                "is not private. Start from a constant, or from numbers that you may publish."
            )


def _all_equal(one: PyTree, other: PyTree) -> bool:
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), one, other)
    return all(jax.tree.leaves(same))


def check_coupling(
    program: sites.Program,
    initial: Mapping[str, PyTree],
    plates: Mapping[str, sites.Plate],
    example: PyTree,
    key: PRNGKeyArray,
) -> None:
    """Refuses sites whose density for one example depends on another example, or on their number.

    It corrupts the last and the first of a few examples. The densities of the others may not
    change. The name of a site of the guide ends with " of the guide".
    """

    @jax.jit
    def traced(args: PyTree) -> tuple[dict[str, Array], dict[str, Array]]:
        model, guide = program.trace(dict(initial), args, key)
        named = {f"{name}{_OF_GUIDE}": site for name, site in guide.items()} | dict(model)
        scaled, unscaled = {}, {}
        for name, site in sites.sample_sites(named):
            if name in plates:
                scaled[name] = sites.log_prob_by_example(site, plates[name])
                # The scale of a plate follows the length of the batch.
                unscaled[name] = sites.log_prob_by_example({**site, "scale": None}, plates[name])
            else:
                scaled[name] = unscaled[name] = sites.log_prob(site)
        return scaled, unscaled

    # Validation would raise on NaN, which is here on purpose.
    with numpyro.validation_enabled(False):
        clean, unscaled = traced(sites.repeat_example(example, _ROWS))
        _, alone = traced(sites.repeat_example(example, 1))
        # NaN shows most couplings, and the two others those that leave NaN out, such as a rank. A
        # series depends on earlier rows only, so both ends are corrupted.
        for row in (_ROWS - 1, 0):
            others = jnp.asarray([index for index in range(_ROWS) if index != row])
            for change in (jnp.nan, 1.25, -1.25):
                corrupt = functools.partial(_corrupt_row, row=row, change=change)
                corrupted, _ = traced(jax.tree.map(corrupt, example))
                for name, before in clean.items():
                    if name in plates:
                        after = corrupted[name][others]
                        _refuse_change(name, before[others], after, is_local=True)
                    else:
                        _refuse_change(name, before, corrupted[name], is_local=False)
    # Batches of two lengths draw different latents of their examples, so these show nothing.
    draws_locally = any(name.endswith(_OF_GUIDE) for name in plates)
    for name, before in unscaled.items():
        if name in plates:
            if draws_locally:
                continue
            before = before[:1]
        if _differ(before, alone[name]):
            raise ValueError(
                f"the density of site {name!r} depends on the number of examples in the batch. Use "
                "num_examples, which is a constant, in place of len(x)."
            )


def _corrupt_row(leaf: Array, row: int, change: float) -> Array:
    rows = sites.repeat_example(leaf, _ROWS)
    if jnp.issubdtype(rows.dtype, jnp.inexact):
        return rows.at[row].add(jnp.asarray(change, rows.dtype))
    return rows.at[row].set(~leaf if rows.dtype == bool else leaf + 1)


def _differ(before: Array, after: Array) -> bool:
    # Statistics of equal examples may be NaN, such as 0 / 0. A finite density is a change, then.
    return not jnp.allclose(before, after, rtol=1e-4, equal_nan=True)


def _refuse_change(name: str, before: Array, after: Array, *, is_local: bool) -> None:
    if not _differ(before, after):
        return
    if is_local:
        raise ValueError(
            f"site {name!r} couples examples: its density for one depends on another. "
            "A private gradient needs a density of each example by itself."
        )
    raise ValueError(
        f"site {name!r} lies in no plate over the data, yet its density depends on "
        "the data. Put it into that plate, or make it depend on constants alone."
    )
