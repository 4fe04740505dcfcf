"""Fingerprint of a step: a digest of its program, its data, its devices and its processor.

A resumed run may replay steps with the same noise only if it computes the same gradients bit for
bit. Otherwise two different gradients would be released with one noise, and their difference would
reveal them. So everything that can change a bit of a gradient is part of the fingerprint.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import secrets
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.training._multihost import combine_digests, from_first_process

# With this XLA flag a GPU sums in a fixed order and gives the same bits again.
DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops"


def fingerprint(program: str, data: Iterable[PyTree]) -> str:
    """Returns a digest of a lowered program, its data and the machine."""
    digest = hashlib.sha256()
    devices = [f"{device.platform} {device.device_kind}" for device in jax.devices()]
    flags = os.environ.get("XLA_FLAGS", "")
    versions = (jax.__version__, importlib.metadata.version("jaxlib"), platform.platform(), flags)
    for text in (program, *versions, *devices, _processor()):
        digest.update(text.encode())
    if not is_reproducible(program, jax.default_backend(), flags):
        # A random part: no later run has this fingerprint, so none replays these steps.
        digest.update(str(from_first_process(secrets.randbits(31))).encode())
    for tree in data:
        for leaf in jax.tree.leaves(tree):
            for array in local_arrays(leaf):
                digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return combine_digests(digest.hexdigest())


def says_all(program: str) -> bool:
    """Whether equal texts of lowered programs mean equal programs."""
    # The program does not contain the Python function behind a callback.
    has_callback = "callback" in program
    # With this setting the program does not contain its constants.
    hides_constants = getattr(jax.config, "jax_use_simplified_jaxpr_constants", False)
    return not has_callback and not hides_constants


def is_reproducible(program: str, backend: str, flags: str) -> bool:
    """Whether a lowered program gives the same bits again on the same machine."""
    # By default a GPU sums in whatever order its threads finish. The last flag given counts.
    given = [flag for flag in flags.split() if flag.startswith(f"{DETERMINISTIC_FLAG}=")]
    deterministic = backend != "gpu" or given[-1:] in (
        [f"{DETERMINISTIC_FLAG}=true"],
        [f"{DETERMINISTIC_FLAG}=1"],
    )
    return says_all(program) and deterministic


def _processor() -> str:
    """Describes what decides how a CPU rounds sums: its kind, instructions and thread count."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = ("model name", "flags", "Features")  # the last is ARM's
    kinds = {line for line in lines if line.startswith(fields)}
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        count = os.cpu_count() or 0
    return repr((sorted(kinds), platform.processor(), count, os.environ.get("NPROC")))


def local_arrays(leaf: Any) -> Iterator[np.ndarray]:
    """Yields the parts of a leaf that this process holds."""
    if _validate.is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        yield from (np.asarray(shard.data) for shard in leaf.addressable_shards)
    else:
        yield np.asarray(leaf)
