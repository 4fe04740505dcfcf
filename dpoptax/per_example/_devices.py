"""Speed and memory of devices: the one table from which the cost model reads.

Programs are chosen when they are traced. The device is that of the mesh in `jax.set_mesh`, also if
the program is compiled ahead of time for a machine that is not there. Without a mesh it is
`jax.config.jax_default_device`, or the first device.
"""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """Peak figures of one device.

    Attributes:
        kind: how `jax.Device.device_kind` begins.
        narrow_flops: operations per second of matrix products in bfloat16.
        wide_flops: the same in float32, at `jax.lax.Precision.HIGHEST`.
        bandwidth: bytes per second from and to its memory.
        memory: bytes.
    """

    kind: str
    narrow_flops: float
    wide_flops: float
    bandwidth: float
    memory: float

    @property
    def is_cpu(self) -> bool:
        """Whether it is a CPU."""
        return self.kind == "cpu"


def _tpu(kind: str, narrow_flops: float, bandwidth: float, memory: float) -> Device:
    # A float32 product at the highest precision takes six passes in bfloat16.
    return Device(kind, narrow_flops, narrow_flops / 6, bandwidth, memory)


# The first row whose `kind` begins the name of the device is used.
#
# CPU: measured on an x86-64 CPU with 2 cores: products of 2,048 x 2,048 and an addition over 256
# MiB, JAX 0.10.2. XLA multiplies bfloat16 in float32 there. The memory is a fixed assumption, so
# that the choice does not depend on the machine.
# TPU: cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e.
# GPU: the data sheets of NVIDIA for the A100, H100 and H200 with SXM connectors, without sparsity.
# Float32 at the highest precision runs on the CUDA cores.
DEVICES = (
    Device("cpu", 2.4e11, 3.2e11, 1.0e10, 1.6e10),
    _tpu("TPU v4", 275e12, 1.228e12, 32e9),
    _tpu("TPU v5 lite", 197e12, 0.819e12, 16e9),
    _tpu("TPU v5", 459e12, 2.765e12, 95e9),
    _tpu("TPU v6 lite", 918e12, 1.64e12, 32e9),
    Device("NVIDIA A100-SXM4-40GB", 312e12, 19.5e12, 1.555e12, 40e9),
    Device("NVIDIA A100-PCIE-40GB", 312e12, 19.5e12, 1.555e12, 40e9),
    Device("NVIDIA A100", 312e12, 19.5e12, 2.039e12, 80e9),
    Device("NVIDIA H100", 989e12, 67e12, 3.35e12, 80e9),
    Device("NVIDIA H200", 989e12, 67e12, 4.8e12, 141e9),
)

# Other devices are taken for these, by platform. Of the listed ones they have the least memory.
_STAND_INS = {"cpu": "cpu", "tpu": "TPU v5 lite", "gpu": "NVIDIA A100-SXM4-40GB"}


def device_named(kind: str, platform: str) -> Device:
    """Returns the figures of a kind of device, or those of a similar one."""
    for name in (kind, _STAND_INS.get(platform, _STAND_INS["gpu"])):
        for device in DEVICES:
            if name.startswith(device.kind):
                return device
    raise AssertionError("each stand-in is in the table")


def current_device() -> Device:
    """Returns the figures of the device for which a program is traced."""
    return device_named(*kind_of_device())


def is_single_cpu() -> bool:
    """Whether a program runs on one CPU without a mesh, where the whole batch is in one place."""
    alone = jax.device_count() == 1 and jax.sharding.get_abstract_mesh().empty
    return alone and current_device().is_cpu


def kind_of_device() -> tuple[str, str]:
    """Returns the kind and the platform of that device."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.device_kind, described.platform
    config: Any = jax.config
    default = config.jax_default_device
    if isinstance(default, str):  # a platform
        (default, *_) = jax.devices(default)
    device = default or jax.devices()[0]
    return device.device_kind, device.platform
