"""Key derivation by name: one key per purpose, and a key for each text."""

import dataclasses
import hashlib
import json
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import attrs
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from dpoptax.random._allowed_keys import allowed_key
from dpoptax.random._chacha import rounds_of
from dpoptax.random._threefry_unrolled import THREEFRY


class Keys(NamedTuple):
    """One key per purpose.

    Attributes:
        sampling_key: for the batches. Keep it secret: amplification by sampling rests on it.
        noise_key: for the noise of the releases. Keep it secret.
        model_key: for dropout, reparameterised draws and the like. No guarantee rests on its
            secrecy. From a ChaCha root it is a key of JAX's default PRNG, which is faster.

    Example:
        >>> import jax
        >>> split_by_purpose(jax.random.key(0))._fields
        ('sampling_key', 'noise_key', 'model_key')
    """

    sampling_key: PRNGKeyArray
    noise_key: PRNGKeyArray
    model_key: PRNGKeyArray


def split_by_purpose(key: PRNGKeyArray) -> Keys:
    """Derives one key per purpose from a root key. Do not use the root key for anything else.

    The keys are derived by name, so no `fold_in` or `split` elsewhere gives one of them by
    accident. With numbers this happens: `jax.random.split(key, 3)[1]` and
    `jax.random.fold_in(key, 1)` are the same key with JAX's default PRNG.

    Args:
        key: a typed PRNG key.

    Returns:
        Three independent keys.

    Raises:
        TypeError: the key is not a typed Threefry or ChaCha key.

    Example:
        >>> import jax
        >>> keys = split_by_purpose(jax.random.key(0))
        >>> keys.noise_key.shape
        ()
    """
    root = allowed_key("key", key)
    keys = Keys(*(derive_key(root, f"dpoptax {purpose}") for purpose in Keys._fields))
    if rounds_of(root) is None:
        return keys
    words = jax.random.bits(keys.model_key, (2,), jnp.uint32)
    return keys._replace(model_key=jax.random.wrap_key_data(words, impl=THREEFRY))


def derive_key(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """Derives a key from a key and a name; a different key or name gives a different result.

    Args:
        key: a typed PRNG key. Derive everything else from it by `derive_key` or by `fold_in`.
        name: any text, such as `"augmentation"`.

    Returns:
        A key of the same type.

    Example:
        >>> import jax
        >>> root = jax.random.key(0)
        >>> augmentation_key = derive_key(root, "augmentation")
        >>> augmentation_key == derive_key(root, "dropout")
        Array(False, dtype=bool)
    """
    digest = hashlib.sha256(name.encode()).digest()
    # 64 bits of the digest, by two `fold_in` of 32 bits each: the names in use are few.
    for word in np.frombuffer(digest[:8], "<u4"):
        key = jax.random.fold_in(key, word)
    return key


def fingerprint(*values: Any) -> str:
    """Returns a text that is equal for equal values only: what noise keys are derived from.

    The rules are these and no others, so the noise does not depend on `repr` or on the format of
    any file: numbers are exact, containers keep their type, and an object is the name of its class
    with the names and values of its fields.
    """
    return ";".join(map(_canonical, values))


def _canonical(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return float(value).hex()
    if isinstance(value, str):
        return json.dumps(value)  # ASCII, whatever version of Unicode Python knows
    if type(value) in (tuple, list):
        items = ",".join(map(_canonical, value))
        return f"({items})" if type(value) is tuple else f"[{items}]"
    if type(value) is dict:
        entries = sorted(f"{_canonical(key)}:{_canonical(item)}" for key, item in value.items())
        return "{" + ",".join(entries) + "}"
    name = _class_name(type(value))
    fields = ",".join(
        f"{json.dumps(field)}={_canonical(item)}" for field, item in _fields(value).items()
    )
    return f"{name}({fields})"


def _class_name(cls: type) -> str:
    # Without private modules, so that a class may move between files without changing the noise.
    public = [part for part in cls.__module__.split(".") if not part.startswith("_")]
    return ".".join([*public, cls.__qualname__])


def _fields(value: Any) -> Mapping[str, Any]:
    """Returns the fields of an object by name; refuses arrays, functions and the like."""
    if attrs.has(type(value)):
        return {field.name: getattr(value, field.name) for field in attrs.fields(type(value))}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    # A plain object. The others may hold what `vars` does not show: a function its code, a partial
    # its arguments, an array its numbers.
    opaque = callable(value) or isinstance(value, Container) or hasattr(value, "dtype")
    if hasattr(value, "__dict__") and not opaque:
        return vars(value)
    raise TypeError(
        "a clip rule or mechanism must consist of numbers, strings, tuples, lists, dicts and "
        "frozen classes of these, because the noise keys are derived from its fields; got "
        f"a value of type {type(value).__name__}. Pass an array as tuple(array.tolist()), and a "
        "function as a class with fields."
    )
