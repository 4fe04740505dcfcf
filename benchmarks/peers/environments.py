"""Python environments for the other systems, installed from the package index on first use.

On a machine without an index, set `DPOPTAX_PEERS=here`: then all systems run in the environment of
the benchmark, which must have them.
"""

import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / ".venv" / "peers"


class Peer(NamedTuple):
    """A system that is measured.

    Attributes:
        title: as the tables call it.
        framework: "jax" or "torch"; ratios are to the step of the same without privacy.
        requirements: what to install; None for what dpoptax itself needs.
    """

    title: str
    framework: str
    requirements: tuple[str, ...] | None = None


TORCH = ("torch==2.13.0", "opacus==1.6.0")
PEERS = {
    "jax": Peer("JAX, not private", "jax"),
    "dpoptax": Peer("dpoptax", "jax"),
    "dpoptax_chacha20": Peer("dpoptax, ChaCha20", "jax"),
    "vmap": Peer("JAX by vmap", "jax"),
    "optax": Peer("optax.contrib", "jax"),
    # With dpoptax, for the models are its own.
    "jax_privacy": Peer("JAX Privacy", "jax", ("jax-privacy==2.0.0", "--editable", ".")),
    "torch": Peer("torch, not private", "torch", TORCH),
    "opacus_hooks": Peer("Opacus, hooks", "torch", TORCH),
    "opacus_ghost": Peer("Opacus, ghost", "torch", TORCH),
}
# Without privacy, by framework.
PLAIN = {"jax": "jax", "torch": "torch"}


def python_of(name: str) -> str:
    """Returns a Python that can run the peer.

    Raises:
        RuntimeError: it cannot be installed; with the end of what pip said.
    """
    requirements = PEERS[name].requirements
    if requirements is None or os.environ.get("DPOPTAX_PEERS") == "here":
        return sys.executable
    folder = FOLDER / requirements[0].replace("==", "-")
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        print(f"installing {', '.join(requirements)}", file=sys.stderr, flush=True)
        install = [
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", *requirements],
        ]
        for command in install:
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if ran.returncode:
                raise RuntimeError(f"cannot be installed: {ran.stderr.strip()[-300:]}")
        done.write_text("\n".join(requirements))
    return str(python)


def environment(devices: int) -> dict[str, str]:
    """Returns the environment variables of a worker; more than one device are virtual ones."""
    flags = f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""
    return os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    }
