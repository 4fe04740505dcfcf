"""Write-ahead log: a step is recorded on disk before it runs, so no crash can under-count releases.

What is charged, and why that is enough:

1. `authorize(n)` is on disk before step n - 1 runs. After a crash at any moment, the log holds at
   least all steps that may have run.
2. A resumed run starts at its last checkpoint, so some authorized steps run again. If the program,
   the data and the keys are the same, these steps are the same releases bit for bit. They are
   charged once.
3. If anything changed, the run must not use the same noise for other gradients. It begins a new
   segment with new keys. The steps of the old segment after the checkpoint are *lost*: they may
   have been released, and no later run repeats them. They stay charged for good.

The file has two slots, written in turn, each with a checksum. A crash during a write damages one
slot and leaves the other. The file never grows, so a full disk does not stop a write.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax

# Bytes per slot. A segment takes about 100 bytes, so a run can change its program 300 times.
SLOT_SIZE = 1 << 15
FORMAT = "dpoptax write-ahead log 1"


class Segment(NamedTuple):
    """Steps `first` to `end - 1`, authorized for one program."""

    program: str
    first: int
    end: int


class WriteAheadLog:
    """The segments of a run, on disk before their steps run."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._sequence = 0
        self.segments: list[Segment] = []
        slots = path.read_bytes() if path.exists() else b""
        # A new file is blank until its first write is complete: nothing ran yet.
        if slots.strip():
            parsed = [_parse(slots[start : start + SLOT_SIZE]) for start in (0, SLOT_SIZE)]
            records = [record for record in parsed if record is not None]
            if not records:
                raise ValueError(
                    f"{path} cannot be read, so it is unknown how many steps were released. Start "
                    "again in another folder, and count this run in full."
                )
            self._sequence, self.segments = max(records)

    def continues(self, program: str, step: int) -> bool:
        """Whether `program` at `step` repeats or continues the last segment bit for bit."""
        last = self.segments[-1] if self.segments else None
        return last is not None and last.program == program and last.first <= step <= last.end

    def begin_segment(self, program: str, step: int) -> None:
        """Begins a segment: from `step` on, another program or other keys."""
        self.segments.append(Segment(program, step, step))
        self._write()

    def authorize(self, end: int) -> None:
        """Records that the steps before `end` may be released; must precede them.

        If it raises OSError, the steps must not run.
        """
        *before, last = self.segments
        if end > last.end:
            self.segments = [*before, last._replace(end=end)]
            self._write()

    def lost_steps(self, done: int) -> Iterator[tuple[int, int]]:
        """Yields step ranges that may have been released and are not among the `done` steps."""
        # A segment contributes its steps up to where the next one begins. What it authorized
        # beyond that point was lost.
        kept = done
        for segment in reversed(self.segments):
            first = max(segment.first, kept)
            if first < segment.end:
                yield first, segment.end
            kept = min(kept, segment.first)

    def _write(self) -> None:
        self._sequence += 1
        body = json.dumps(
            {"format": FORMAT, "sequence": self._sequence, "segments": self.segments}
        ).encode()
        line = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
        if len(line) > SLOT_SIZE:
            raise OSError(f"{self._path} is full: the run was changed too often.")
        if jax.process_index() != 0:  # all processes have the same log, and one writes it
            return
        if not self._path.exists():
            self._path.write_bytes(b" " * (2 * SLOT_SIZE))
            self._path.chmod(0o600)
        with self._path.open("r+b") as file:
            # Overwrite the older slot: the newer one stays whole until this write is complete.
            file.seek(SLOT_SIZE * (self._sequence % 2))
            file.write(line.ljust(SLOT_SIZE))
            file.flush()
            os.fsync(file.fileno())


def _parse(slot: bytes) -> tuple[int, list[Segment]] | None:
    """Returns sequence number and segments of a slot, or None if it is damaged."""
    digest, _, body = slot.rstrip().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    record = json.loads(body)
    if record["format"] != FORMAT:
        return None
    return record["sequence"], [Segment(*segment) for segment in record["segments"]]
