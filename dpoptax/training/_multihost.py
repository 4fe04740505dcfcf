"""What one process decides in, what all of them do out: none may make a step that others do not."""

import hashlib

import jax
import numpy as np
from jax.experimental import multihost_utils


def of_first(number: int) -> int:
    """Returns the number of the first process, in all of them.

    Args:
        number: whatever this process found.

    Returns:
        The same everywhere.
    """
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def if_any(flag: bool) -> bool:
    """Returns whether any process wants something, in all of them.

    Args:
        flag: what this process wants.

    Returns:
        The same everywhere.
    """
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


def of_all(digest: str) -> str:
    """Returns a digest of the digests of all processes.

    Args:
        digest: of this process, in hexadecimal digits.

    Returns:
        The same everywhere; with one process, the digest itself.
    """
    if jax.process_count() == 1:
        return digest
    own = np.frombuffer(bytes.fromhex(digest), np.uint8)
    return hashlib.sha256(multihost_utils.process_allgather(own).tobytes()).hexdigest()


def together(where: str) -> None:
    """Waits until all processes are here.

    Args:
        where: the same text everywhere.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
