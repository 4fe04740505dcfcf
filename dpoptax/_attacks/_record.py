"""Audits as JSON: the scores and the plan."""

import json
import sys
from collections.abc import Iterable
from typing import Any

from dpoptax import _serialize
from dpoptax._plan import Plan
from dpoptax._validate import described

FORMAT = "dpoptax audit 1"
SCORES = ("in_scores", "out_scores")
NAMES = ("attack", "num_steps", "independent", "plan", *SCORES)


def write_audit(audit: Any) -> str:
    """Returns an audit as JSON."""
    content = {
        "attack": audit.attack,
        "num_steps": audit.num_steps,
        "independent": audit.independent,
        "plan": json.loads(audit.plan.to_json()),
    }
    # An infinite score becomes a string, as everywhere.
    scores = {name: _serialize.encode(getattr(audit, name).tolist()) for name in SCORES}
    return _serialize.write_document(FORMAT, content | scores)


def read_audit(text: str, classes: Iterable[type]) -> dict[str, Any]:
    """Returns the arguments of the audit that a text holds; refuses any other text."""
    content = _serialize.read_document(text, FORMAT, NAMES)
    for name, kind in (("attack", str), ("independent", bool), *((name, list) for name in SCORES)):
        if not isinstance(content[name], kind):
            raise ValueError(
                f"{name} of an audit must be a {kind.__name__} in JSON; got "
                f"{described(content[name])}. Pass the text that to_json wrote."
            )
    for name in SCORES:
        wrong = [item for item in content[name] if not _is_score(item)]
        if wrong:
            raise ValueError(
                f"{name} of an audit must be numbers; got {described(wrong[0])}. Pass the text "
                "that to_json wrote."
            )
        content[name] = [float(item) for item in content[name]]
    content["plan"] = Plan.from_json(json.dumps(content["plan"]), classes=classes)
    return content


def _is_score(item: Any) -> bool:
    if isinstance(item, int | float) and not isinstance(item, bool):
        # JSON has whole numbers of any size.
        return abs(item) <= sys.float_info.max
    return item in ("inf", "-inf")
