"""Verify a certificate: compute its epsilon again, by another library where that is possible."""

import math
from importlib import metadata
from typing import Any

import dp_accounting
from dp_accounting.pld import PLDAccountant

from dpoptax import _serialize, _validate, accounting
from dpoptax.accounting._epsilon import run_event
from dpoptax.accounting._event_json import decode_event, encode_event
from dpoptax.audit._certificate import FORMAT, GUARANTEE, NAMES
from dpoptax.mechanisms import Mechanism, StatefulMechanism
from dpoptax.relations import parse_relation
from dpoptax.reports import round_up
from dpoptax.samplers import Sampler

# The two libraries round up on different grids.
TOLERANCE = 0.01
# An event with less loss than stated is not that of the certificate.
_MOST_BELOW = 0.02
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
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            "expected a guarantee with event, relation, epsilon and delta; got a fault in "
            f"{error}. Pass the text that Certificate.to_json wrote."
        ) from None
    if not math.isfinite(stated):
        raise ValueError(f"expected a finite epsilon; got {stated}. It promises nothing.")
    try:
        found, library = _epsilon(event, delta, relation)
    except (TypeError, ArithmeticError) as error:
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
    limits = _limits(content["releases"], known, relation)
    return (
        f"{library} finds epsilon = {round_up(found)} {where}; the certificate says "
        f"{round_up(stated)}. They agree within {max(TOLERANCE, _MOST_BELOW):.0%}.\n"
        f"{limits}Not verified here: that the program ({content['program']}) is the one that ran."
    )


def _limits(releases: Any, known: dict[str, Any], relation: Any) -> str:
    """Returns what was found out about the event; raises if it is not that of the releases."""
    try:
        events = [
            run_event(
                _serialize.decode(release["sampler"], Sampler),
                _serialize.decode_number(release["noise_multiplier"]),
                known["num_releases"],
                relation,
                _serialize.decode(release["mechanism"], (Mechanism, StatefulMechanism)),
            )
            for release in releases
        ]
        rebuilt = [encode_event(event) for event in events]
    except (KeyError, TypeError, ValueError, NotImplementedError):
        rebuilt = []
    if not rebuilt:
        return "Not verified here: that the event is that of the releases that are listed.\n"
    if any(one != known["event"] for one in rebuilt):
        raise ValueError(
            "expected the event of the releases that the certificate lists; got another one. "
            "Event, releases or their number were changed. Do not use this certificate."
        )
    return "The event is that of the releases that are listed.\n"


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
    return found, f"dpoptax (dp-accounting does not know this {name} under this relation)"
