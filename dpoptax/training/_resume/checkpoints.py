"""Checkpoints of a run in a folder, written so that a kill at any moment leaves a whole one.

Orbax writes a checkpoint under a temporary name and renames it when it is complete. Each one
contains a record of the run and a digest of its arrays. A damaged checkpoint fails its digest, and
the one before it is used. This module imports Orbax, so import it only for a run that is saved.
"""

import json
import pathlib
import warnings
from typing import Any

import jax
import orbax.checkpoint as ocp

from dpoptax._pytree import PyTree
from dpoptax.training._multihost import barrier
from dpoptax.training._resume import array_codec
from dpoptax.training._resume.base import Restored
from dpoptax.training._resume.folder_lock import FolderLock
from dpoptax.training._resume.settings import Checkpoints
from dpoptax.training._resume.write_ahead_log import WriteAheadLog

FORMAT = "dpoptax checkpoint 2"


class RunFolder:
    """The folder of one run: its write-ahead log and its checkpoints."""

    def __init__(self, settings: Checkpoints, identity: dict[str, Any]) -> None:
        self._path = pathlib.Path(settings.path).resolve()
        self._path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = FolderLock(self._path) if jax.process_index() == 0 else None
        barrier("the folder is there")
        self._identity = identity
        try:
            self.log = WriteAheadLog(self._path / "write_ahead_log")
            self._manager = ocp.CheckpointManager(
                self._path / "checkpoints",
                # Synchronous, so that a checkpoint that `save` reports as written is on disk.
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=settings.keep, create=True, enable_async_checkpointing=False
                ),
            )
        except BaseException:
            self._unlock()
            raise

    def restore(self, like: PyTree) -> Restored | None:
        """Returns the latest readable state with the structure and sharding of `like`.

        None if nothing was saved. A ValueError if the folder holds another run, or if no checkpoint
        can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            record = self._read_record(step)
            if record is None:
                continue
            self._compare_identity(record)
            self._compare_structure(record, like)
            try:
                state = self._read_state(step, record, like)
            except Exception as error:  # damage shows in as many ways as there are readers
                self._warn_damaged(step, error)
                continue
            # The run will save these steps again, and Orbax refuses a step that exists.
            for damaged in self._manager.all_steps():
                if damaged > step:
                    self._manager.delete(damaged)
            return Restored(state, step, record["segment"], record["prng"])
        if steps:
            raise ValueError(
                f"none of the checkpoints {steps} in {self._path} can be read. Steps that ran stay "
                "released: start again in another folder, and count this run in full."
            )
        return None

    def save(self, step: int, state: PyTree, *, segment: int, prng: str) -> bool:
        """Writes a checkpoint of `step` done steps; returns whether it was written.

        A failure is a warning, because older checkpoints and the log keep the count right.
        """
        arrays = array_codec.encode(state)
        record = {
            "format": FORMAT,
            "identity": self._identity,
            "segment": segment,
            "prng": prng,
            "leaves": array_codec.describe_all(state),
            "digest": array_codec.digest(arrays),
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
                f"the checkpoint of step {step} was not written ({_short(error)}); training "
                f"continues, and the last whole one is of step {self._manager.latest_step()}.",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        return True

    def close(self) -> None:
        """Frees the folder."""
        self._manager.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _read_record(self, step: int) -> dict[str, Any] | None:
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
            )
            record: dict[str, Any] = restored["record"]
            if record["format"] != FORMAT:
                raise ValueError(f"its format is {record['format']!r}, not {FORMAT!r}")
        except Exception as error:  # damage, as in `restore`
            self._warn_damaged(step, error)
            return None
        return record

    def _read_state(self, step: int, record: dict[str, Any], like: PyTree) -> PyTree:
        targets = array_codec.targets(like, record["leaves"])
        arrays = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(targets))
        )["state"]
        if array_codec.digest(arrays) != record["digest"]:
            raise ValueError("its arrays are not those that were written")
        return array_codec.decode(arrays, like, record["leaves"])

    def _compare_identity(self, record: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self._identity))
        for name, before in record["identity"].items():
            if before != now[name]:
                raise ValueError(
                    f"{self._path} holds a run with another {name}: {before} there, {now[name]} "
                    "here. Continue that run as it was, or start again in another folder, and "
                    "add the full cost of that run to the new one."
                )

    def _compare_structure(self, record: dict[str, Any], like: PyTree) -> None:
        before = {name: shown[:2] for name, shown in record["leaves"].items()}
        now = {name: shown[:2] for name, shown in array_codec.describe_all(like).items()}
        if before != now:
            name = min(name for name in before | now if before.get(name) != now.get(name))
            raise ValueError(
                f"{self._path} holds a run with another optimizer state; {name} is "
                f"{before.get(name, 'absent')} there, {now.get(name, 'absent')} here. "
                "Continue with that optimizer, or start again in another folder, and add the "
                "full cost of that run to the new one."
            )

    def _warn_damaged(self, step: int, error: Exception) -> None:
        warnings.warn(
            f"the checkpoint of step {step} in {self._path} cannot be read ({_short(error)}); "
            "the run continues from the one before it.",
            RuntimeWarning,
            stacklevel=3,
        )


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
