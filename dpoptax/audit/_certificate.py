"""The certificate of a step: what it releases, what is secret, and where private data leak."""

import platform
import textwrap
from importlib import metadata
from typing import Any

import attrs

from dpoptax import _serialize
from dpoptax._package_classes import is_of_package
from dpoptax._plan import Plan
from dpoptax.accounting._event_json import encode_event
from dpoptax.audit._records import Event
from dpoptax.audit._words import words
from dpoptax.relations import parse_relation
from dpoptax.reports import round_up

FORMAT = "dpoptax certificate 1"
_PACKAGES = ("dpoptax", "jax", "jaxlib", "optax", "numpy", "dp-accounting")
_WIDTH = 100
# How many outputs of a kind the text lists. The JSON has all of them.
_MOST = 6
# The fields of the JSON.
NAMES = words(
    """
    guarantee releases released secret nonprivate trusted assumptions program generators
    versions
    """
)
GUARANTEE = ("epsilon", "delta", "relation", "num_releases", "unit", "event")
# What every certificate rests on, beside what it names.
TRUSTED = (
    "dpoptax clips each row of the gradients, sums, and adds the stated noise",
    "the sampler draws batches by its law",
)
ASSUMED = (
    "The keys are secret, and no key is used for two runs.",
    "The program that runs is the one with this digest, and it makes no more releases than stated.",
    "Leaves that are named nonprivate_ are not published, and nothing depends on them.",
    "What was computed from the data before this step is private by other means, or not in use.",
)


@attrs.frozen
class Leak:
    """A way of private data, or of a secret, out of a step.

    Attributes:
        output: the leaf that it reaches; empty if the step is wrong whatever it returns.
        what: what happened.
        where: the line of the program, as "file:line (function)".

    Example:
        >>> print(Leak("output[0]", "`reduce_sum` combines private values", "train.py:12 (step)"))
        output[0]: `reduce_sum` combines private values, at train.py:12 (step)
    """

    output: str
    what: str
    where: str

    def __str__(self) -> str:
        place = f", at {self.where}" if self.where else ""
        return f"{self.output}: {self.what}{place}" if self.output else f"{self.what}{place}"


@attrs.frozen
class Release:
    """One call of a private transformation in a step.

    Attributes:
        clip: the clip rule.
        noise_multiplier: as in `privatize`.
        expected_batch_size: as in `privatize`.
        mechanism: how the noise is drawn.
        sampler: of the batch; None for all examples.
        where: the line of the program.
    """

    clip: Any
    noise_multiplier: Any
    expected_batch_size: Any
    mechanism: Any
    sampler: Any
    where: str


def release_of(event: Event, sampler: Any) -> Release:
    """Returns the release of an event, from what its transformation says of itself."""
    rule, _, noise, size, mechanism = event.detail[:5]
    return Release(rule, noise, size, mechanism, sampler, event.where)


@attrs.frozen
class Certificate:
    """What `dpoptax.certify` found out about a step.

    Attributes:
        leaks: where private data, or the randomness that protects them, leave the step. Empty if
            the step is certified.
        releases: the releases of the step.
        released: the outputs that depend on private data through releases only.
        secret: the outputs that are keys, or random numbers of the sampler. Do not publish them.
        nonprivate: the outputs that depend on private data, as their names say.
        assumptions: what the caller has to do.
        program: a digest of the traced step, without the arrays that it captured.
        generators: the types of the keys.
        plan: the plan that all releases are steps of; None if none was given.

    Example:
        >>> import jax, jax.numpy as jnp, dpoptax
        >>> tx = dpoptax.privatize(1.0, 1.1, expected_batch_size=9, key=jax.random.key(0))
        >>> def step(grads, state, params):
        ...     return tx.update(grads, state, params)
        >>> params = jnp.zeros(2)
        >>> found = dpoptax.certify(
        ...     step, jnp.ones((9, 2)), tx.init(params), params, private="grads"
        ... )
        >>> found.certified, found.released, found.secret
        (True, ('output[0]',), ('output[1].key',))
    """

    leaks: tuple[Leak, ...]
    releases: tuple[Release, ...]
    released: tuple[str, ...]
    secret: tuple[str, ...]
    nonprivate: tuple[str, ...]
    assumptions: tuple[str, ...]
    program: str
    generators: tuple[str, ...]
    plan: Plan | None = None

    @property
    def certified(self) -> bool:
        """Whether private data reach the outputs through releases only."""
        return not self.leaks

    def require(self) -> "Certificate":
        """Returns the certificate; raises a ValueError with all leaks if there are some."""
        if self.leaks:
            raise ValueError(
                "expected a step that returns private data through clip, sum and noise only; got\n"
                + "\n".join(f"  {leak}" for leak in self.leaks)
                + "\nRemove these ways, or name a leaf nonprivate_... and do not publish it."
            )
        return self

    def trusted(self) -> tuple[str, ...]:
        """Returns the code and the laws that the certificate rests on, those of users by name."""
        names = [name for name in attrs.fields_dict(Release) if name != "where"]
        held = [getattr(release, name) for release in self.releases for name in names]
        own = {
            f"{kind.__module__}.{kind.__qualname__}"
            for kind in _kinds_of(held)
            if kind is not type(None)
            and not any(is_of_package(kind, name) for name in ("dpoptax", "builtins", "numpy"))
        }
        return (
            *TRUSTED,
            *(f"your own {name} does what its interface says" for name in sorted(own)),
        )

    def to_json(self) -> str:
        """Returns the certificate as JSON, for `dpoptax verify`. It holds public numbers only.

        Raises:
            ValueError: the step is not certified.
        """
        self.require()
        return _serialize.write_document(FORMAT, self._content())

    def _content(self) -> dict[str, Any]:
        releases = [
            {
                name: _serialize.encode_or_describe(getattr(release, name))
                for name in attrs.fields_dict(Release)
                if name != "where"
            }
            for release in self.releases
        ]
        return {
            "guarantee": None if self.plan is None else _guarantee(self.plan),
            "releases": releases,
            "released": list(self.released),
            "secret": list(self.secret),
            "nonprivate": list(self.nonprivate),
            "trusted": list(self.trusted()),
            "assumptions": [*ASSUMED, *self.assumptions],
            "program": f"sha256 {self.program}",
            "generators": list(self.generators),
            "versions": {"python": platform.python_version(), **_versions()},
        }

    def __str__(self) -> str:
        """Returns the certificate as text."""
        if self.leaks:
            lines = ["Not certified: private data leave the step without protection."]
            return "\n".join([*lines, *(f"  {leak}" for leak in self.leaks)])
        lines = ["Certified: private data leave the step through clip, sum and noise only."]
        if self.plan is not None:
            known = _guarantee(self.plan)
            lines.append(
                f"  epsilon = {round_up(self.plan.epsilon())} at delta = {self.plan.delta:g} "
                f"({known['relation']}), for {self.plan.num_steps:,} releases"
            )
        for release in self.releases:
            sampler = "all examples" if release.sampler is None else f"{release.sampler}"
            lines += _wrapped(
                "release",
                f"{release.clip}, noise multiplier {release.noise_multiplier}, by "
                f"{release.mechanism}, of {sampler}",
            )
        for name in ("released", "secret", "nonprivate"):
            if paths := getattr(self, name):
                more = f" and {len(paths) - _MOST} more" if len(paths) > _MOST else ""
                lines += _wrapped(name, ", ".join(paths[:_MOST]) + more)
        for name in self.trusted():
            lines += _wrapped("trusts", name)
        for name in (*ASSUMED, *self.assumptions):
            lines += _wrapped("assumes", name)
        return "\n".join([*lines, f"  program: sha256 {self.program}"])


def _kinds_of(values: Any) -> set[type]:
    """Returns the types of values and of the fields of those that are made of fields."""
    found = set()
    for value in values:
        found.add(type(value))
        if attrs.has(type(value)):
            fields = attrs.fields_dict(type(value))
            found |= _kinds_of([getattr(value, name, None) for name in fields])
        elif isinstance(value, dict):
            found |= _kinds_of(value.values())
        elif isinstance(value, list | tuple):
            found |= _kinds_of(value)
    return found


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(f"{name}: {text}", _WIDTH, initial_indent="  ", subsequent_indent="    ")


def _guarantee(plan: Plan) -> dict[str, Any]:
    return {
        "epsilon": plan.epsilon(),
        "delta": plan.delta,
        "relation": parse_relation(plan.sampler.relation).name.lower(),
        "num_releases": plan.num_steps,
        "unit": plan.sampler.unit,
        "event": encode_event(plan.event()),
    }


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _PACKAGES}
