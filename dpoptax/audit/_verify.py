"""Verify a certificate: compute its epsilon again, by another library where that is possible."""

import math
import re
from importlib import metadata
from typing import Any

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


def verify(text: str) -> str:
    """Returns a statement about the epsilon of a certificate, computed again.

    Args:
        text: from `Certificate.to_json`.

    Returns:
        One paragraph.

    Raises:
        ValueError: the text is no certificate, it has no plan, or its epsilon is too small.
    """
    content = _serialize.read_document(text, FORMAT, NAMES)
    if content["guarantee"] is None:
        raise ValueError(
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
        raise ValueError(f"expected a finite epsilon; got {stated}. It promises nothing.")
    try:
        found, library = _epsilon(event, delta, relation)
    except (TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"expected an event with numbers that can be accounted; got a fault: {error}. Pass the "
            "text that Certificate.to_json wrote."
        ) from None
    where = f"at delta = {delta:g} ({relation.name.lower()})"
    if not found <= stated * (1 + TOLERANCE):
        raise ValueError(
            f"expected epsilon of at most {round_up(stated)} {where}, as the certificate says; "
            f"{library} finds {round_up(found)}. Do not use this certificate."
        )
    if found < stated * (1 - _MOST_BELOW):
        raise ValueError(
            f"expected an event with epsilon = {stated:g} {where}, as the certificate says; "
            f"{library} finds only {found:g}. Event, delta or epsilon were changed. Do not use "
            "this certificate."
        )
    limits = _limits(content, known, relation)
    return (
        f"{library} finds epsilon = {round_up(found)} {where}; the certificate says "
        f"{round_up(stated)}. They agree within {max(TOLERANCE, _MOST_BELOW):.0%}.\n"
        f"{limits}Not verified here: that the program ({content['program']}) is the one that ran."
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
            raise ValueError(
                f"expected in {name} all that every certificate rests on; something is missing. "
                "Do not use this certificate."
            )


def _limits(content: dict[str, Any], known: dict[str, Any], relation: Any) -> str:
    """Returns what was found out about the event; raises if it is not that of the releases."""
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
            raise ValueError(
                "expected in trusted every class of the user that a release has; one is missing. "
                "Do not use this certificate."
            )
    for release in releases:
        if release not in own:
            _check_release(release, known, relation)
    if own or not releases:
        return "Not verified here: that the event is that of the releases that are listed.\n"
    return "The event is that of the releases that are listed.\n"


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
        raise ValueError(
            "expected releases that can be accounted, as those of a plan can; got a fault: "
            f"{type(error).__name__}. Do not use this certificate."
        ) from None
    for name, (rebuilt, stated) in found.items():
        if rebuilt != stated:
            raise ValueError(
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
        return found, f"dp-accounting {metadata.version('dp-accounting')} alone"
    found = accounting.event_epsilon(event, delta=delta, relation=relation.name.lower())
    name = type(event).__name__
    return found, f"dpoptax, because dp-accounting cannot account a {name} here,"
