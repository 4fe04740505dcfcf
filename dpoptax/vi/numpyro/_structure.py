"""The structure of a model and guide: how their sites change with the number of examples.

Traces of one, two and three examples are compared. They are abstract, so nothing is computed. The
model is traced by itself too: a latent whose size is that of the batch is seen only where the model
does not take the value of the guide.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from dpoptax._pytree import PyTree
from dpoptax.vi.numpyro import _sites as sites

SIZES = (1, 2, 3)


class Frame(NamedTuple):
    """A plate around a site: the size in this batch, and the full one."""

    size: int
    full: int


class SiteShape(NamedTuple):
    """What is known of a site without its values."""

    kind: str
    shape: tuple[int, ...]
    batch_shape: tuple[int, ...] = ()
    event_shape: tuple[int, ...] = ()
    frames: Mapping[str, Frame] = {}
    is_observed: bool = False
    is_auxiliary: bool = False
    is_discrete: bool = False
    extra_scale: float | None = 1.0
    distribution: str = ""

    @property
    def is_latent(self) -> bool:
        """Whether the site draws a latent that a guide must draw too."""
        return self.kind == "sample" and not self.is_observed


# By number of examples, then by name of the site.
Shapes = tuple[Mapping[str, SiteShape], ...]


class Structure(NamedTuple):
    """Shapes of the sites of a model, or of a guide, with one, two and three examples."""

    shapes: Shapes

    def growing_frames(self, name: str) -> list[str]:
        """Returns the plates around a site that grow with the batch."""
        one, two = (by_name[name].frames for by_name in self.shapes[:2])
        return [plate for plate in two if two[plate].size != one[plate].size]

    def grows(self, name: str, attribute: str = "shape") -> bool:
        """Whether an attribute of a site changes with the number of examples."""
        return len({getattr(by_name[name], attribute) for by_name in self.shapes}) > 1

    def samples(self) -> Iterator[tuple[str, SiteShape]]:
        """Yields the sites that draw or observe, with their shapes for one example."""
        return ((name, site) for name, site in self.shapes[0].items() if site.kind == "sample")


def model_structure(program: sites.Program, example: PyTree, key: PRNGKeyArray) -> Structure:
    """Returns the structure of the model by itself."""
    return Structure(tuple(site_shapes(program.model_trace, example, size, key) for size in SIZES))


def guide_structure(
    program: sites.Program, values: Mapping[str, PyTree], example: PyTree, key: PRNGKeyArray
) -> Structure:
    """Returns the structure of the guide, which must have run before: autoguides set up then."""

    def trace(_: Mapping[str, PyTree], args: PyTree, key: PRNGKeyArray) -> sites.Trace:
        found: sites.Trace = program.guide_trace(values, args, key)
        return found

    return Structure(tuple(site_shapes(trace, example, size, key) for size in SIZES))


def data_plates(structure: Structure, num_examples: int) -> dict[str, sites.Plate]:
    """Returns the plate over the data of each site that lies in one: those that grow."""
    plates: dict[str, sites.Plate] = {}
    for name, site in structure.samples():
        grown = structure.growing_frames(name)
        if not grown:
            continue
        full = [site.frames[plate].full for plate in grown]
        # plate(len(x)) has the size of the batch, here 1; plate(N, subsample_size=len(x)) has N.
        if len(grown) > 1 or full[0] not in (1, num_examples):
            raise ValueError(
                f"site {name!r} lies in the plate(s) over the data {grown} of size(s) "
                f"{full}; expected one, of size {num_examples}, the number "
                f"of examples: plate({grown[0]!r}, {num_examples}, subsample_size=len(x))."
            )
        plates[name] = sites.Plate(grown[0], float(full[0]))
    return plates


def site_shapes(trace: Any, example: PyTree, size: int, key: PRNGKeyArray) -> dict[str, SiteShape]:
    """Returns the shapes of the sites of `trace({}, args, key)` for a number of examples."""
    found: dict[str, SiteShape] = {}

    def record(args: PyTree) -> None:
        traced = trace({}, args, key)
        sizes = {
            name: Frame(len(site["value"]), site["args"][0])
            for name, site in traced.items()
            if site["type"] == "plate"
        }
        found.update({name: _shape(site, sizes) for name, site in traced.items()})

    with warnings.catch_warnings():  # the plates are checked here
        warnings.filterwarnings("ignore", "subsample_size does not match", UserWarning)
        jax.eval_shape(record, sites.repeat_example(example, size))
    return found


def _shape(site: sites.Site, sizes: Mapping[str, Frame]) -> SiteShape:
    if site["type"] != "sample":
        leaves = jax.tree.leaves(site.get("value"))
        return SiteShape(site["type"], sum((np.shape(leaf) for leaf in leaves), ()))
    # The full size of a plate that a handler hides is unknown: 0.
    frames = {
        frame.name: sizes.get(frame.name, Frame(frame.size, 0))
        for frame in site["cond_indep_stack"]
    }
    return SiteShape(
        kind="sample",
        shape=np.shape(site["value"]),
        batch_shape=tuple(site["fn"].batch_shape),
        event_shape=tuple(site["fn"].event_shape),
        frames=frames,
        is_observed=site["is_observed"],
        is_auxiliary=site["infer"].get("is_auxiliary", False),
        is_discrete=bool(getattr(site["fn"].support, "is_discrete", False)),
        extra_scale=_extra_scale(site, frames),
        distribution=_distribution_name(site["fn"]),
    )


def _extra_scale(site: sites.Site, frames: Mapping[str, Frame]) -> float | None:
    """Returns the constant by which `handlers.scale` scales a site; None if it is not constant."""
    scale = site["scale"]
    if scale is None:
        return 1.0
    if isinstance(scale, jax.core.Tracer) or np.ndim(scale) > 0:
        return None
    of_plates = np.prod([frame.full / frame.size for frame in frames.values() if frame.full])
    return float(scale) / float(of_plates)


def _distribution_name(fn: Any) -> str:
    """Returns the name of the class of a distribution, without the wrappers around it."""
    name = type(fn).__name__
    while type(fn).__name__ in ("ExpandedDistribution", "Independent", "MaskedDistribution"):
        if type(fn).__name__ == "Independent":
            name = "Independent"
        fn = fn.base_dist
    return f"{type(fn).__name__}.to_event" if name == "Independent" else type(fn).__name__
