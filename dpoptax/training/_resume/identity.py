"""Identity of a run: what must be equal when the run is resumed."""

import hashlib
from typing import Any

import jax
import numpy as np

from dpoptax import _serialize
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.random._chacha import KEY_ROUNDS, rounds_of
from dpoptax.training._resume.array_codec import describe_all


def identity_of(plan: Plan, params: PyTree, key: Any) -> dict[str, Any]:
    """Returns the identity of a run as JSON; `key` is the caller's, or None for a new one."""
    secret = "a new key"
    if key is not None:
        rounds = rounds_of(key)
        # Fewer rounds are another generator. The words of a key do not show them.
        kind = b"" if rounds in (None, KEY_ROUNDS) else f"chacha{rounds}".encode()
        words = np.asarray(jax.random.key_data(key)).tobytes()
        secret = hashlib.sha256(kind + words).hexdigest()
    return {
        **_encode_plan(plan),
        "model": {name: shown[:2] for name, shown in describe_all(params).items()},
        "key (its digest)": secret,
    }


def _encode_plan(plan: Plan) -> dict[str, Any]:
    """All of a plan that decides its noise and its guarantee; steps may be added later."""
    return {
        "sampler": _serialize.encode_or_describe(plan.sampler),
        "clip": _serialize.encode_or_describe(plan.clip),
        "noise multiplier": _serialize.encode_or_describe(plan.noise_multiplier),
        "mechanism": _serialize.encode_or_describe(plan.mechanism),
        "delta": plan.delta,
    }
