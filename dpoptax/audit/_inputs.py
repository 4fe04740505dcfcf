"""Labels of what goes into a step: its arguments, and the arrays that it captured."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import attrs
import jax
import jax.numpy as jnp
import numpy as np

from dpoptax import _validate
from dpoptax.audit._captured_rows import has_one_entry_per_example, holds, is_column
from dpoptax.audit._known_keys import root_of_words
from dpoptax.audit._labels import DATA, MIXED, Label, Ordered, Reason, Rows
from dpoptax.audit._origins import Number, Path
from dpoptax.audit._slots import Slots, slots_of
from dpoptax.audit._states import Place, places_of
from dpoptax.audit._values import counts

_NONPRIVATE = "nonprivate_"


@attrs.frozen
class Inputs:
    """The arguments of a step.

    Attributes:
        specs: the arguments as shapes.
        labels: of the leaves.
        paths: the names of the leaves.
        num_examples: how many rows the private data have.
        columns: the private arrays that can be read, to find them among captured arrays.
        names: of roots of keys and of numbers, for messages.
        in_state: the roots and numbers that belong to the state of a sampler or of `privatize`.
        kept: names for the arrays that a mechanism keeps, which tell the noise.
        slots: where the arguments have keys and secrets.
    """

    specs: tuple[Any, ...]
    labels: list[Label]
    paths: list[str]
    num_examples: int
    columns: list[Any]
    names: dict[Any, str]
    in_state: set[Any]
    kept: set[Path]
    slots: Slots


def read_inputs(step: Callable[..., Any], args: tuple[Any, ...], private: Any) -> Inputs:
    """Returns the labels of the arguments.

    Args:
        step: the function, for the names of its arguments.
        args: arrays or their shapes.
        private: as in `certify`.
    """
    numbers, captured = _chosen(step, args, private)
    columns = [*jax.tree.leaves([args[number] for number in sorted(numbers)]), *captured]
    sizes = {jnp.shape(leaf)[:1] for leaf in columns}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "private data must be arrays with one row per example, a common leading axis; got "
            f"leading axes {sorted(size[0] if size else 0 for size in sizes)}. Pass in private "
            "what holds the examples, and only that."
        )
    (num_examples,) = sizes.pop()
    _refuse_static_columns([args[number] for number in sorted(numbers)], num_examples)
    known = list(filter(_is_concrete, columns))
    found = Inputs((), [], [], num_examples, known, {}, set(), set(), {})
    labelled, structure = jax.tree_util.tree_flatten_with_path(args)
    for (path, leaf), place in zip(labelled, places_of(args), strict=True):
        name = f"args{jax.tree_util.keystr(path)}"
        found.paths.append(name)
        is_private = path[0].idx in numbers
        kept = place is not None and (place.is_noise or place.is_table)
        if place is not None and kept and not is_private and not _validate.is_key(leaf):
            label = _secret_label(found, name, place.is_noise)
        else:
            in_state = place is not None and place.field in ("key", "step")
            label = _label(found, leaf, name, is_private, in_state)
            label = _unless_nonprivate(label, step, path)
        found.labels.append(attrs.evolve(label, state=_state_of(place)))
    specs = jax.tree.unflatten(structure, [_spec(leaf) for _, leaf in labelled])
    return attrs.evolve(found, specs=specs, slots=slots_of(args, found.labels, numbers))


def _refuse_static_columns(private: Any, num_examples: int) -> None:
    """Raises if the structure of private data, which is no array, has an entry per example."""
    left: list[Any] = [jax.tree.structure(private)]
    while left:
        node = left.pop()
        left += node.children()
        kind, static = node.node_data() or (None, None)
        if kind not in (None, dict, list, tuple) and _entries(static) >= num_examples:
            raise ValueError(
                "private data must be arrays in a tree; got a static field with as many entries as "
                f"examples, in a {kind.__name__}. Make it a leaf of the tree."
            )


def _entries(static: Any) -> int:
    """Returns how many entries a static value has, with those of the values in it."""
    if isinstance(static, str | bytes | bytearray):
        return len(static)
    if isinstance(static, np.ndarray | jax.Array):
        return int(np.size(static))
    if isinstance(static, dict):
        return sum(map(_entries, static.values()))
    if isinstance(static, Iterable):
        return sum(map(_entries, static))
    if isinstance(static, type) or callable(static):
        return 1
    fields = [*getattr(static, "__dict__", {}).values()]
    fields += [getattr(static, name, None) for name in getattr(type(static), "__slots__", ())]
    return max(1, sum(map(_entries, fields)))


def _state_of(place: Place | None) -> Any:
    """Returns the state that a leaf belongs to, for what must be as it was left."""
    if place is None or not place.of_release:
        return None if place is None else place.number
    if place.position is None:
        return None
    return Ordered(place.number, place.position, ("argument", place.number))


def _chosen(
    step: Callable[..., Any], args: tuple[Any, ...], private: Any
) -> tuple[set[int], list[Any]]:
    """Returns which arguments are private, and the private arrays that are no argument."""
    parameters = inspect.signature(step).parameters
    names = list(parameters)
    numbers: set[int] = set()
    captured: list[Any] = []
    for leaf in jax.tree.leaves(private):
        if isinstance(leaf, str) and leaf in names:
            first = names.index(leaf)
            # `*columns` stands for all arguments from there on.
            several = parameters[leaf].kind is inspect.Parameter.VAR_POSITIONAL
            numbers.update(range(first, len(args)) if several else [first])
        elif isinstance(leaf, int) and not isinstance(leaf, bool) and 0 <= leaf < len(args):
            numbers.add(leaf)
        elif isinstance(leaf, jax.Array | np.ndarray) and np.ndim(leaf):
            captured.append(leaf)
        else:
            raise ValueError(
                "private must be the number or the name of an argument, several of them, or the "
                f"arrays that the step captured; got {_validate.described(leaf)} for a step with "
                f"the arguments {', '.join(names)}. Pass for example private='{names[-1]}'."
            )
    if not numbers and not captured:
        raise ValueError(
            "private must name at least one argument; got none. Pass the one with the examples."
        )
    return numbers, captured


def _secret_label(inputs: Inputs, name: str, is_noise: bool) -> Label:
    path = (("root", ("state", name)),)
    if is_noise:
        inputs.kept.add(path)
    return Label(draws=frozenset({path}), declared=True)


def _unless_nonprivate(label: Label, step: Callable[..., Any], path: Any) -> Label:
    """Returns the label of an argument, which is private if its name says that nothing else is."""
    names = list(inspect.signature(step).parameters)
    first = names[path[0].idx] if path[0].idx < len(names) else ""
    if label.data is not None or not (first.startswith(_NONPRIVATE) or is_nonprivate(path)):
        return label
    return Label(data=MIXED, reason=Reason("an argument that is named nonprivate_ is used", ""))


def is_nonprivate(path: Any) -> bool:
    """Whether a part of a path has the name of what may depend on private data in any way."""
    names = [getattr(part, field, "") for part in path for field in ("key", "name")]
    return any(str(name).startswith(_NONPRIVATE) for name in names)


def _label(inputs: Inputs, leaf: Any, name: str, is_private: bool, in_state: bool) -> Label:
    data = Rows(0, DATA) if is_private else None
    if _validate.is_key(leaf):
        root = root_of(leaf, name)
        inputs.names.setdefault(root, name)
        if in_state:
            inputs.in_state.add(root)
        many = (("split", tuple(leaf.shape), None),) if leaf.shape else ()
        return Label(data=data, paths=frozenset({(root, *many)}))
    number = None
    if jnp.shape(leaf) == () and counts(jnp.result_type(leaf)):
        variable = ("input", len(inputs.labels), None)
        number = Number.of(variable)
        inputs.names[variable] = name
        if in_state:
            inputs.in_state.add(variable)
    if not is_private and jnp.ndim(leaf):
        # Data that are passed a second time.
        found = constant_label(inputs, leaf, tables_are_private=False)
        content = np.asarray(leaf).tobytes() if _is_concrete(leaf) else name
        words = ("words", content) if _may_be_words(leaf) and found.is_clean else None
        return Label(data=found.data, reason=found.reason, words=words)
    return Label(data=data, number=None if is_private else number)


def _may_be_words(leaf: Any) -> bool:
    """Whether an array may hold the words of one key."""
    one_axis = len(jnp.shape(leaf)) == 1 and jnp.shape(leaf) != (1,)
    return one_axis and jnp.result_type(leaf) == jnp.uint32


def root_of(key: Any, name: str) -> Any:
    """Returns the root of a key: equal keys have one root."""
    return root_of_words(key) if _is_concrete(key) else ("root", ("input", name))


def constant_label(inputs: Inputs, value: Any, tables_are_private: bool) -> Label:
    """Returns the label of an array that the program captured.

    With `tables_are_private`, an array with one entry per example is taken for private data.
    """
    if _validate.is_key(value):
        root = root_of(value, "captured")
        # What the program captured need not be independent of the keys of the arguments.
        if root[1][0] == "key" and root not in inputs.names:
            root = ("root", ("captured", *root[1][1:]))
        many = (("split", tuple(value.shape), None),) if value.shape else ()
        return Label(paths=frozenset({(root, *many)}))
    if not _is_concrete(value):
        return Label()
    array = np.asarray(value)
    is_table = array.ndim > 0 and array.shape[0] == inputs.num_examples > 1
    if is_table and (tables_are_private or any(is_column(array, one) for one in inputs.columns)):
        return Label(data=Rows(0, DATA))
    if tables_are_private and has_one_entry_per_example(array.shape, inputs.num_examples):
        what = "an array that the program captured has one entry per example"
        return Label(data=MIXED, reason=Reason(what, ""))
    if any(holds(array, np.asarray(column)) for column in inputs.columns):
        what = "an array that the program captured holds rows of the private data"
        return Label(data=MIXED, reason=Reason(what, ""))
    if array.size != 1:
        return Label(words=("written", array.tobytes()) if _may_be_words(value) else None)
    number = None
    if array.dtype.kind in "iu":
        number = Number(offset=int(array.reshape(()))).in_32_bits()
    return Label(number=number, uniform=array.reshape(()).item())


def _is_concrete(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array | np.ndarray) and not isinstance(leaf, jax.core.Tracer)
    return is_array and getattr(leaf, "is_fully_addressable", True)


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
    if _validate.is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    dtype = jax.dtypes.canonicalize_dtype(jnp.result_type(leaf))
    weak = getattr(leaf, "weak_type", isinstance(leaf, int | float | complex))
    return jax.ShapeDtypeStruct(jnp.shape(leaf), dtype, weak_type=bool(weak))
