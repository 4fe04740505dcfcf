"""A train state in, a folder that survives a kill at any moment out; and back.

Orbax writes a checkpoint beside the others and renames it when it is whole. With each goes a record
of the run, and a digest by which a damaged one is told and passed over for the one before it. The
folder holds keys, so it is as sensitive as the data; only its owner may read it.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import warnings
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree

from dpoptax import _serialize, _validate
from dpoptax._plan import Plan
from dpoptax.random._chacha20 import CHACHA20, CHACHA20_TAG
from dpoptax.training._multihost import together
from dpoptax.training._resume.write_ahead_log import Journal

try:
    import fcntl
except ImportError:  # on Windows a folder has no lock
    fcntl = None  # type: ignore[assignment]

FORMAT = "dpoptax checkpoint 1"
NOTICE = "This folder holds keys of differential privacy: keep it as the training data are kept.\n"


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where a run is kept, and how often.

    Attributes:
        path: a folder of this run alone; made if absent.
        every_seconds: how much time a crash may cost; a checkpoint is also written at the end.
        keep: how many checkpoints to keep; two at least, lest the last one be damaged.

    Raises:
        TypeError: a number of the wrong kind.
        ValueError: a number out of range.

    Example:
        >>> Checkpoints("runs/mnist", every_seconds=300).keep
        2
    """

    path: str | os.PathLike[str]
    every_seconds: float = 60.0
    keep: int = 2

    def __post_init__(self) -> None:
        _validate.non_negative("every_seconds", self.every_seconds)
        _validate.count("keep", self.keep, at_least=2)


class Restored(NamedTuple):
    """A state as it was, and what was recorded with it."""

    state: Any
    step: int
    segment: int
    generator: str


class RunFolder:
    """The folder of one run: its journal and its checkpoints."""

    def __init__(self, settings: Checkpoints, identity: dict[str, Any]) -> None:
        """Opens the folder, or makes it.

        Args:
            settings: where, and how much to keep.
            identity: what must not change from one start of the run to the next.

        Raises:
            ValueError: a folder with other things in it.
        """
        self._path = pathlib.Path(settings.path).resolve()
        self._path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _claimed(self._path) if jax.process_index() == 0 else None
        together("the folder is there")
        self.journal = Journal(self._path / "journal")
        self._identity = identity
        self._manager = ocp.CheckpointManager(
            self._path / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                max_to_keep=settings.keep, create=True, enable_async_checkpointing=False
            ),
        )

    def restore(self, like: PyTree) -> Restored | None:
        """Returns the latest state that can be read, or None if there never was one.

        Args:
            like: a state of the same structure, which says where its arrays are to lie.

        Returns:
            What was saved.

        Raises:
            ValueError: it is of another run, or none of the checkpoints can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            record = self._record(step)
            if record is None:
                continue
            self._compare(record)
            before = {name: shown[:2] for name, shown in record["leaves"].items()}
            now = {name: _description(leaf)[:2] for name, leaf in _named_leaves(like).items()}
            if before != now:
                name = min(name for name in before | now if before.get(name) != now.get(name))
                raise ValueError(
                    f"{self._path} holds a run whose optimizer has another state; {name} is "
                    f"{before.get(name, 'absent')} there, {now.get(name, 'absent')} here. "
                    "Go on with that one, or begin anew in another folder."
                )
            try:
                state = self._state(step, record, like)
            except Exception as error:  # damage shows in as many ways as there are readers
                self._passed_over(step, error)
                continue
            for damaged in self._manager.all_steps():
                if damaged > step:  # the run will come to it again
                    self._manager.delete(damaged)
            return Restored(state, step, record["segment"], record["generator"])
        if steps:
            raise ValueError(
                f"none of the checkpoints {steps} in {self._path} can be read. The steps that ran "
                "stay released: begin anew in another folder, and count this run in full."
            )
        return None

    def save(self, step: int, state: PyTree, *, segment: int, generator: str) -> bool:
        """Writes a checkpoint; a failure is a warning, and leaves those that there are.

        Args:
            step: how many steps are done.
            state: what the next one needs.
            segment: of the journal.
            generator: where the random numbers come from, in words.

        Returns:
            Whether it was written.
        """
        leaves = _named_leaves(state)
        # Orbax takes no arrays without elements.
        arrays = {
            str(number): _data(leaf) for number, leaf in enumerate(leaves.values()) if leaf.size
        }
        record = {
            "format": FORMAT,
            "identity": self._identity,
            "segment": segment,
            "generator": generator,
            "leaves": {name: _description(leaf) for name, leaf in leaves.items()},
            "digest": _digest(arrays),
        }
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record)
                ),
                force=True,
            )
        except Exception as error:  # a full disk shows in as many ways as there are writers
            warnings.warn(
                f"the checkpoint of step {step} was not written ({_short(error)}); training goes "
                f"on, and the last whole one is of step {self._manager.latest_step()}.",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        return True

    def close(self) -> None:
        """Releases the folder."""
        self._manager.close()
        if self._lock is not None:
            self._lock.close()

    def _record(self, step: int) -> dict[str, Any] | None:
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
            )
            record: dict[str, Any] = restored["record"]
            if record["format"] != FORMAT:
                raise ValueError(f"its format is {record['format']!r}, not {FORMAT!r}")
        except Exception as error:  # as above
            self._passed_over(step, error)
            return None
        return record

    def _compare(self, record: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self._identity))
        for name, before in record["identity"].items():
            if before != now[name]:
                raise ValueError(
                    f"{self._path} holds a run of another {name}: {before} there, {now[name]} here."
                    " Go on with the first, or begin anew in another folder."
                )

    def _state(self, step: int, record: dict[str, Any], like: PyTree) -> PyTree:
        leaves = _named_leaves(like)
        targets = {}
        for number, (name, leaf) in enumerate(leaves.items()):
            shape, dtype, _ = record["leaves"][name]
            if 0 in shape:
                continue
            sharding = getattr(_data(leaf), "sharding", None)
            targets[str(number)] = jax.ShapeDtypeStruct(
                tuple(shape), jnp.dtype(dtype), sharding=sharding
            )
        arrays = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(targets))
        )["state"]
        if _digest(arrays) != record["digest"]:
            raise ValueError("its arrays are not those that were written")
        found = []
        for number, (name, leaf) in enumerate(leaves.items()):
            if str(number) not in arrays:
                found.append(leaf)
                continue
            array, tied = arrays[str(number)], getattr(_data(leaf), "committed", False)
            found.append(_key(array if tied else _freed(array), record["leaves"][name][2]))
        return jax.tree.unflatten(jax.tree.structure(like), found)

    def _passed_over(self, step: int, error: Exception) -> None:
        warnings.warn(
            f"the checkpoint of step {step} in {self._path} cannot be read ({_short(error)}); "
            "going on from the one before it.",
            RuntimeWarning,
            stacklevel=3,
        )


def _claimed(path: pathlib.Path) -> IO[str] | None:
    """Makes an empty folder one of a run, and locks it; the system frees it with the process."""
    notice = path / "HOLDS_KEYS.txt"
    if not notice.exists():
        if any(path.iterdir()):
            raise ValueError(
                f"{path} holds other things than a run. Name a folder for this run "
                "alone: keys are kept in it, and only its owner may read it."
            )
        path.chmod(0o700)
        notice.write_text(NOTICE)
    if fcntl is None:
        return None
    file = (path / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(
            f"another process is training in {path}. Wait until it has ended: two would "
            "release what one is charged for."
        ) from None
    return file


def identity_of(plan: Plan, params: PyTree, key: Any) -> dict[str, Any]:
    """Returns what must be the same whenever a run is taken up.

    Args:
        plan: of the run.
        params: the initial parameters, of which names, shapes and types count.
        key: as the user gave it, None for a new one.

    Returns:
        A record for JSON.
    """
    secret = "drawn anew"
    if key is not None:
        data = key if isinstance(key, int | np.integer) else jax.random.key_data(key)
        secret = hashlib.sha256(np.asarray(data).tobytes()).hexdigest()
    return {
        "sampler": _serialize.encode_or_describe(plan.sampler),
        "clip": _serialize.encode_or_describe(plan.clip),
        "noise multiplier": _serialize.encode_or_describe(plan.noise_multiplier),
        "mechanism": repr(plan.mechanism),
        "delta": plan.delta,
        "model": {
            jax.tree_util.keystr(path): _description(leaf)[:2]
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        },
        "key (its digest)": secret,
    }


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _data(leaf: Any) -> Array:
    return jax.random.key_data(leaf) if _validate.is_key(leaf) else jnp.asarray(leaf)


def _description(leaf: Any) -> list[Any]:
    """Shape, type, and the generator of a key."""
    data = _data(leaf)
    generator = str(jax.random.key_impl(leaf)) if _validate.is_key(leaf) else None
    return [list(data.shape), data.dtype.name, generator]


def _freed(array: Array) -> Array:
    """An array of one device as a new one, not tied to it: programs differ by such ties."""
    return jnp.asarray(np.asarray(array)) if len(array.sharding.device_set) == 1 else array


def _key(data: Array, generator: str | None) -> Array:
    if generator is None:
        return data
    return jax.random.wrap_key_data(data, impl=CHACHA20 if generator == CHACHA20_TAG else generator)


def _digest(arrays: dict[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        # What lies with other processes cannot be looked at from here.
        if arrays[name].is_fully_addressable:
            digest.update(np.asarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
