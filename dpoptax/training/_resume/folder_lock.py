"""Ownership of a run's folder: private to its owner, and used by one process at a time."""

import pathlib
from typing import IO

try:
    import fcntl
except ImportError:  # on Windows a folder has no lock
    fcntl = None  # type: ignore[assignment]

NOTICE = (
    "This folder holds keys of differential privacy: protect it as you protect the training data.\n"
)


class FolderLock:
    """Claims a folder for one run; the operating system frees it when the process ends."""

    def __init__(self, path: pathlib.Path) -> None:
        notice = path / "HOLDS_KEYS.txt"
        # The notice marks a folder of ours. Never turn another folder private or write into it.
        if not notice.exists():
            if any(path.iterdir()):
                raise ValueError(
                    f"{path} holds other things than a run. Name a folder for this run alone: keys "
                    "are kept in it, and only its owner may read it."
                )
            path.chmod(0o700)
            notice.write_text(NOTICE)
        self._file: IO[str] | None = None
        if fcntl is None:
            return
        self._file = (path / "lock").open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(
                f"another process is training in {path}. Wait until it has ended: two processes "
                "would release different gradients, and one of them would not be charged. If this "
                "process made the run, call close() on its PrivateRun first."
            ) from None

    def close(self) -> None:
        """Frees the folder."""
        if self._file is not None:
            self._file.close()
