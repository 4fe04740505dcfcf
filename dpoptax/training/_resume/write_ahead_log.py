"""Steps about to run in, a file that no crash can make count too few of them out.

A run that goes on after a crash repeats the steps since its last checkpoint. Repeated by the same
program on the same data under the same keys they are the same releases, and count once. A changed
program must not draw the same noise: it begins a new segment, with keys of its own, and what the
old one may have released beyond the checkpoint stays counted.

The file is overwritten in place, two halves in turn, each with its checksum: a write that is torn
by a crash leaves the other half, and a full disk does not stop it.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax

SLOT = 1 << 15
FORMAT = "dpoptax journal 1"


class Segment(NamedTuple):
    """Steps `first` to `last - 1` were let run by one program."""

    program: str
    first: int
    last: int


class Journal:
    """The segments of a run, on disk before their steps run."""

    def __init__(self, path: pathlib.Path) -> None:
        """Reads what there is; an absent file is an empty journal.

        Args:
            path: of the file, in a folder that exists.

        Raises:
            ValueError: neither half of the file can be read.
        """
        self._path = path
        self._sequence = 0
        self.segments: list[Segment] = []
        halves = path.read_bytes() if path.exists() else b""
        if halves.strip():  # else nothing was let run
            found = [_parsed(halves[start : start + SLOT]) for start in (0, SLOT)]
            records = [record for record in found if record is not None]
            if not records:
                raise ValueError(
                    f"{path} cannot be read, so nobody can tell how many steps were released. "
                    "Begin anew in another folder, and count this run in full."
                )
            self._sequence, self.segments = max(records)

    def continues(self, program: str, step: int) -> bool:
        """Whether `program` at `step` goes on with what it was let run last.

        Args:
            program: a digest of all that decides what a step releases, but for keys.
            step: the next.

        Returns:
            True if steps that ran already would be the same releases again.
        """
        last = self.segments[-1] if self.segments else None
        return last is not None and last.program == program and last.first <= step <= last.last

    def begin(self, program: str, step: int) -> None:
        """Begins a segment.

        Args:
            program: as in `continues`.
            step: the first that will run.
        """
        self.segments.append(Segment(program, step, step))
        self._write()

    def allow(self, steps: int) -> None:
        """Writes, before they run, that steps up to number `steps` may be released.

        Args:
            steps: how many in all.

        Raises:
            OSError: it could not be written; the steps must not run.
        """
        *before, last = self.segments
        if steps > last.last:
            self.segments = [*before, last._replace(last=steps)]
            self._write()

    def lost(self, done: int) -> Iterator[tuple[int, int]]:
        """Gives the steps that were let run and are no part of the run as it stands.

        Args:
            done: how many steps the run as it stands has.

        Yields:
            First step and the one behind the last.
        """
        kept = done
        for segment in reversed(self.segments):
            first = max(segment.first, kept)
            if first < segment.last:
                yield first, segment.last
            kept = min(kept, segment.first)

    def _write(self) -> None:
        self._sequence += 1
        body = json.dumps(
            {"format": FORMAT, "sequence": self._sequence, "segments": self.segments}
        ).encode()
        line = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
        if len(line) > SLOT:
            raise OSError(f"{self._path} is full: the run was taken up too often.")
        if jax.process_index() != 0:  # all have the same journal, and one writes it
            return
        if not self._path.exists():
            self._path.write_bytes(b" " * (2 * SLOT))
            self._path.chmod(0o600)
        with self._path.open("r+b") as file:
            file.seek(SLOT * (self._sequence % 2))
            file.write(line.ljust(SLOT))
            file.flush()
            os.fsync(file.fileno())


def _parsed(half: bytes) -> tuple[int, list[Segment]] | None:
    digest, _, body = half.rstrip().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    record = json.loads(body)
    if record["format"] != FORMAT:
        return None
    return record["sequence"], [Segment(*segment) for segment in record["segments"]]
