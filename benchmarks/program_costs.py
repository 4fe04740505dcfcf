"""Counts the arithmetic and the communication of a compiled program, with loops multiplied out.

XLA's own counts take the body of a loop once, whatever the number of its turns.
"""

import collections
import math
import re
from typing import NamedTuple

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
SHAPE = re.compile(r"\w+\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|to_apply|branch_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)\}?")
NAME = re.compile(r"%([\w.\-]+)")
# XLA for TPUs may turn a gather and the product after it into one loop, and likewise a product and
# the reduction after it. Such a loop counts as one collective.
FUSED_LOOPS = {
    "windowed_dot_general_body_ag": "all-gather",
    "windowed_dot_general_body_rs": "reduce-scatter",
}


class Instruction(NamedTuple):
    """One line of a computation: `name = kind op(operands), attributes`."""

    name: str
    kind: str
    op: str
    rest: str


def costs(text: str) -> dict[str, float]:
    """Returns `flop`, of matrix products and convolutions, and how often each collective runs.

    Args:
        text: of a compiled program, per device: `compiled.as_text()`.
    """
    computations, entry = _parse(text)
    total: collections.Counter[str] = collections.Counter()
    runs: dict[tuple[str, str], int] = {}

    def walk(name: str, times: int) -> None:
        shapes = {one.name: _dims(one.kind) for one in computations[name]}
        for one in computations[name]:
            if one.op == "dot":
                total["flop"] += times * _flop_of_dot(one, shapes)
            elif one.op == "convolution":
                total["flop"] += times * _flop_of_convolution(one, shapes)
            kind = one.op.removesuffix("-start")
            if kind in COLLECTIVES:
                # A collective that overlaps with other work appears once per piece, with one
                # channel. The piece in the fewest loops says how often it runs.
                channel = re.search(r"channel_id=(\d+)", one.rest)
                key = kind, channel[1] if channel else one.name
                runs[key] = min(times, runs.get(key, times))
            if one.op == "while":
                condition, body = (_attribute(one, name) for name in ("condition", "body"))
                for mark, fused in FUSED_LOOPS.items():
                    total[fused] += times * (mark in body)
                walk(body, times * _turns(computations[condition], computations[body]))
            for group in CALLED.findall(one.rest):
                for callee in re.findall(r"[\w.\-]+", group):
                    if callee in computations:
                        walk(callee, times)

    walk(entry, 1)
    for (kind, _), times in runs.items():
        total[kind] += times
    return dict(total)


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = HEAD.match(line) if not line.startswith(("HloModule", " ")) else None
        if head:
            current = computations.setdefault(head[1], [])
            entry = head[1] if line.startswith("ENTRY") else entry
        elif current is not None and (found := INSTRUCTION.match(line)):
            current.append(Instruction(found[1], *_split(found[2])))
    return computations, entry


def _split(text: str) -> tuple[str, str, str]:
    """Splits `kind op(rest` where the kind may be a tuple in brackets."""
    depth, end = 0, len(text)
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and character == " ":
            end = place
            break
    found = re.match(r"([\w\-]+)\((.*)$", text[end + 1 :])
    return (text[:end], found[1], found[2]) if found else (text, "", "")


def _dims(kind: str) -> list[int]:
    found = SHAPE.search(kind)
    return [int(size) for size in found[1].split(",") if size] if found else []


def _attribute(one: Instruction, name: str) -> str:
    found = re.search(rf"{name}=%?([\w.\-]+)", one.rest)
    assert found is not None, f"no {name} in {one.rest[:80]}"
    return found[1]


def _operands(one: Instruction) -> list[str]:
    return NAME.findall(one.rest.split(")")[0])


def _flop_of_dot(one: Instruction, shapes: dict[str, list[int]]) -> float:
    left = shapes[_operands(one)[0]]
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    axes = [int(axis) for axis in found[1].split(",") if axis] if found else []
    return 2.0 * math.prod(_dims(one.kind)) * math.prod(left[axis] for axis in axes)


def _flop_of_convolution(one: Instruction, shapes: dict[str, list[int]]) -> float:
    """XLA for TPUs writes products as convolutions, whose window may lie beyond the image."""
    image, kernel = (shapes[name] for name in _operands(one)[:2])
    output = _dims(one.kind)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    assert labels is not None
    of_image, of_kernel, of_output = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}

    def field(name: str, axis: int, default: str) -> str:
        return fields[name].split("x")[axis] if name in fields else default

    flop = 2.0 * kernel[of_kernel.index("i")]
    flop *= output[of_output.index("f")] * output[of_output.index("b")]
    for axis in range(len(of_image) - 2):
        size, stride, spread, spacing = (
            int(field(name, axis, "1")) for name in ("size", "stride", "lhs_dilate", "rhs_dilate")
        )
        before = int(field("pad", axis, "0_0").split("_")[0])
        length = (image[of_image.index(str(axis))] - 1) * spread + 1
        flop *= sum(
            0 <= place < length and place % spread == 0
            for step in range(output[of_output.index(str(axis))])
            for place in range(
                step * stride - before, step * stride - before + size * spacing, spacing
            )
        )
    groups = re.search(r"batch_group_count=(\d+)", one.rest)
    return flop / (int(groups[1]) if groups else 1)


def _turns(condition: list[Instruction], body: list[Instruction]) -> int:
    """Returns how often a loop runs that counts from 0 up to a constant."""
    limits = [
        int(one.rest.split(")")[0])
        for one in condition
        if one.op == "constant" and one.kind.startswith(("s32[]", "u32[]"))
    ]
    counters = [
        int(_attribute(one, "index"))
        for one in condition
        if one.op == "get-tuple-element" and one.kind.startswith(("s32[]", "u32[]"))
    ]
    by_name = {one.name: one for one in body}
    results = _operands(body[-1])
    for counter in counters:
        found = by_name.get(results[counter]) if counter < len(results) else None
        while found is not None and found.op in ("copy", "bitcast"):
            found = by_name.get(_operands(found)[0])
        for name in _operands(found) if found is not None and found.op == "add" else ():
            step = by_name.get(name)
            if step is not None and step.op == "constant":
                return -(-max(limits) // int(step.rest.split(")")[0]))
    return max(limits, default=1)
