"""Verify a certificate: compute its epsilon again, by another library where that is possible."""

import math
import re
from importlib import metadata
from typing import Any, NamedTuple

import dp_accounting
from dp_accounting.pld import PLDAccountant

from dpoptax import _serialize, _validate, accounting
from dpoptax.accounting._epsilon import run_event
from dpoptax.accounting._event_json import decode_event, encode_event
from dpoptax.audit._certificate import ASSUMED, FORMAT, GUARANTEE, NAMES, TRUSTED
from dpoptax.mechanisms import Mechanism, StatefulMechanism
from dpoptax.relations import parse_relation
from dpoptax.reports import round_up
from dpoptax.samplers import Sampler

# The two libraries round up on different grids.
TOLERANCE = 0.01
# An event with less loss than stated is not that of the certificate.
_MOST_BELOW = 0.02
_DIGEST, _VERSION = re.compile(r"sha256 [0-9a-f]{64}"), re.compile(r"[\w.+!-]{1,60}", re.ASCII)
_OTHER = dp_accounting.NeighboringRelation.REPLACE_ONE


class CheckFailedError(ValueError):
    """The text is a certificate, but its guarantee is not right, or it has none."""


class Verified(NamedTuple):
    """What was computed from a certificate that is right.

    Attributes:
        epsilon: as computed here.
        stated_epsilon: as the certificate says.
        delta: of both.
        relation: of both.
        computed_by: the library that computed epsilon, and its version.
        event_is_of_releases: whether the event was made again from the listed releases; False if
            one of them has a class of the user.
        program: digest of the program, which is not verified.
    """

    epsilon: float
    stated_epsilon: float
    delta: float
    relation: str
    computed_by: str
    event_is_of_releases: bool
    program: str

    def in_words(self) -> str:
        """Returns one paragraph."""
        releases = "that the event is that of the releases that are listed.\n"
        releases = f"Not verified here: {releases}"
        if self.event_is_of_releases:
            releases = "The event is that of the releases that are listed.\n"
        library = f"{self.computed_by} alone"
        if self.computed_by == "dpoptax":
            library = "dpoptax, because dp-accounting cannot account this event,"
        return (
            f"{library} finds epsilon = {round_up(self.epsilon)} at delta = "
            f"{self.delta:g} ({self.relation}); the certificate says "
            f"{round_up(self.stated_epsilon)}. They agree within "
            f"{max(TOLERANCE, _MOST_BELOW):.0%}.\n"
            f"{releases}Not verified here: that the program ({self.program}) is the one that ran."
        )


def verify(text: str) -> Verified:
    """Computes the epsilon of a certificate again.

    Args:
        text: from `Certificate.to_json`.

    Returns:
        What was found.

    Raises:
        CheckFailedError: the certificate is not right, or it has no epsilon.
        ValueError: the text is no certificate.
    """
    content = _serialize.read_document(text, FORMAT, NAMES)
    if content["guarantee"] is None:
        raise CheckFailedError(
            "expected a certificate with an epsilon; got one that was made without a plan. Pass "
            "dpoptax.certify(..., plan=plan)."
        )
    _check_texts(content)
    known = _serialize.mapping("the guarantee", content["guarantee"])
    if set(known) != set(GUARANTEE):
        raise ValueError(
            f"the guarantee must have the fields {', '.join(GUARANTEE)}; got "
            f"{', '.join(sorted(map(str, known)))}. Pass the text that Certificate.to_json wrote."
        )
    try:
        event, relation = decode_event(known["event"]), parse_relation(known["relation"])
        stated, delta = known["epsilon"], _validate.open_unit("delta", known["delta"])
        stated = _validate.real("epsilon", stated)
    except (KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            "expected a guarantee with event, relation, epsilon and delta; got a fault in "
            f"{error}. Pass the text that Certificate.to_json wrote."
        ) from None
    if not math.isfinite(stated):
        raise CheckFailedError(f"expected a finite epsilon; got {stated}. It promises nothing.")
    try:
        found, library = _epsilon(event, delta, relation)
    except (TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"expected an event with numbers that can be accounted; got a fault: {error}. Pass the "
            "text that Certificate.to_json wrote."
        ) from None
    where = f"at delta = {delta:g} ({relation.name.lower()})"
    if not found <= stated * (1 + TOLERANCE):
        raise CheckFailedError(
            f"expected epsilon of at most {round_up(stated)} {where}, as the certificate says; "
            f"{library} finds {round_up(found)}. Do not use this certificate."
        )
    if found < stated * (1 - _MOST_BELOW):
        raise CheckFailedError(
            f"expected an event with epsilon = {stated:g} {where}, as the certificate says; "
            f"{library} finds only {found:g}. Event, delta or epsilon were changed. Do not use "
            "this certificate."
        )
    return Verified(
        epsilon=found,
        stated_epsilon=stated,
        delta=delta,
        relation=relation.name.lower(),
        computed_by=library,
        event_is_of_releases=_check_releases(content, known, relation),
        program=content["program"],
    )


def _check_texts(content: dict[str, Any]) -> None:
    """Raises if a text is not one that a certificate has: they are printed and relied on."""
    versions = content["versions"]
    # What is no object of versions is no text that a version can be.
    texts = [content["program"], *(versions.values() if isinstance(versions, dict) else [None])]
    patterns = [_DIGEST, *[_VERSION] * (len(texts) - 1)]
    for text, pattern in zip(texts, patterns, strict=True):
        if not (isinstance(text, str) and pattern.fullmatch(text)):
            raise ValueError(
                f"expected the digest of a program and versions; got {_validate.described(text)}. "
                "Pass the text that Certificate.to_json wrote."
            )
    for name, least in {"trusted": TRUSTED, "assumptions": ASSUMED}.items():
        stated = content[name]
        if not isinstance(stated, list) or any(one not in stated for one in least):
            raise CheckFailedError(
                f"expected in {name} all that every certificate rests on; something is missing. "
                "Do not use this certificate."
            )


def _check_releases(content: dict[str, Any], known: dict[str, Any], relation: Any) -> bool:
    """Raises if the event is not that of the releases; returns whether all could be compared."""
    releases = content["releases"]
    if not isinstance(releases, list) or not all(isinstance(one, dict) for one in releases):
        raise ValueError(
            f"expected a list of releases; got {_validate.described(releases)}. Pass the text that "
            "Certificate.to_json wrote."
        )
    if type(known["num_releases"]) is not int or known["num_releases"] < 0:
        raise ValueError(
            "num_releases must be a whole number; got "
            f"{_validate.described(known['num_releases'])}. Pass the text that to_json wrote."
        )
    own = [release for release in releases if _kinds_of_users(release)]
    for kind in {kind for release in own for kind in _kinds_of_users(release)}:
        if not any(kind.replace(":", ".") in str(one) for one in content["trusted"]):
            raise CheckFailedError(
                "expected in trusted every class of the user that a release has; one is missing. "
                "Do not use this certificate."
            )
    for release in releases:
        if release not in own:
            _check_release(release, known, relation)
    return bool(releases) and not own


def _check_release(release: dict[str, Any], known: dict[str, Any], relation: Any) -> None:
    """Raises if the event and the unit are not those of a release."""
    try:
        sampler = _serialize.decode(release["sampler"], Sampler)
        mechanism: Any = _serialize.decode(release["mechanism"], (Mechanism, StatefulMechanism))
        noise = _serialize.decode_number(release["noise_multiplier"])
        event = run_event(sampler, noise, known["num_releases"], relation, mechanism)
        found = {
            "event": (encode_event(event), known["event"]),
            "unit": (sampler.unit, known["unit"]),
            "size": (
                _serialize.encode(sampler.expected_batch_size),
                release["expected_batch_size"],
            ),
        }
    except (KeyError, TypeError, ArithmeticError, NotImplementedError) as error:
        raise CheckFailedError(
            "expected releases that can be accounted, as those of a plan can; got a fault: "
            f"{type(error).__name__}. Do not use this certificate."
        ) from None
    for name, (rebuilt, stated) in found.items():
        if rebuilt != stated:
            raise CheckFailedError(
                f"expected the event of the releases that the certificate lists; got another "
                f"{name}. Event, releases or their number were changed. Do not use this "
                "certificate."
            )


def _kinds_of_users(record: Any) -> list[str]:
    """Returns the classes in a record that are not of this package."""
    if isinstance(record, list):
        return [kind for item in record for kind in _kinds_of_users(item)]
    if not isinstance(record, dict):
        return []
    kind = record.get("kind")
    own = [kind] if isinstance(kind, str) and ":" in kind else []
    return [*own, *_kinds_of_users(list(record.values()))]


def _epsilon(event: Any, delta: float, relation: Any) -> tuple[float, str]:
    """Returns epsilon, and the library that computed it."""
    accountant = PLDAccountant(relation)
    # Under replace_one the noise of an event is relative to the sensitivity there, and to the clip
    # bound here.
    if relation != _OTHER and accountant.supports(event):
        accountant.compose(event)
        found = float(accountant.get_epsilon(delta))
        return found, f"dp-accounting {metadata.version('dp-accounting')}"
    found = accounting.event_epsilon(event, delta=delta, relation=relation.name.lower())
    return found, "dpoptax"
