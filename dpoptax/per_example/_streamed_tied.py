"""Tied tables in the recomputed form: the product is streamed, and the lookup is kept."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax._precision import wide_dtype
from dpoptax.per_example._norm_rules import Factors, NormRule, TiedEmbedding
from dpoptax.per_example._norm_rules.tied_embedding import HeadParts
from dpoptax.per_example._streamed_leaf import Message, StreamedLeaf, sum_no_longer
from dpoptax.per_example._tracing.site import Site

# Indices travel in float32, which holds whole numbers up to this exactly.
MAX_ROWS = 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class TiedLeaf(StreamedLeaf):
    """A table that is looked up and then multiplied, of which the product is streamed.

    The cotangents of the product, one per token and row of the table, are not kept. The cross term
    of the norm needs those of the looked-up rows only.

    Attributes:
        lookup: the site of the lookup.
    """

    rule: TiedEmbedding
    lookup: Site

    @property
    def kept(self) -> tuple[Site, ...]:
        """See `StreamedLeaf.kept`."""
        return (self.lookup,)

    @property
    def cost(self) -> float:
        """See `StreamedLeaf.cost`."""
        return self.rule.cost

    @property
    def message(self) -> Message:
        """See `StreamedLeaf.message`."""
        scans = tuple(scan.length for scan in self.lookup.scans)
        (indices,), output = self.lookup.operands, self.lookup.output
        shapes = (
            jax.ShapeDtypeStruct((*scans, *indices.shape), jnp.float32),
            jax.ShapeDtypeStruct((*scans, *output.shape), output.dtype),
        )
        return super().message._replace(lookup=shapes)

    @property
    def readings(self) -> Any:
        """See `StreamedLeaf.readings`."""
        return self.rule.head_specs

    @property
    def total(self) -> jax.ShapeDtypeStruct:
        """See `StreamedLeaf.total`."""
        return jax.ShapeDtypeStruct(self.spec.shape, wide_dtype(self.spec.dtype))

    def read(self, factors: Factors, message: Message) -> HeadParts:
        """See `StreamedLeaf.read`."""
        return self.rule.head_parts(self._of_lookup(message), factors)

    def add_up(self, factors: Factors, message: Message) -> Array:
        """See `StreamedLeaf.add_up`."""
        both = self.rule.in_order(self._of_lookup(message), factors)
        return sum_no_longer(self.rule, both, message.weights, message.norms[0])

    def squared_norms(self, readings: HeadParts, kept: list[Factors]) -> Float[Array, " batch"]:
        """See `StreamedLeaf.squared_norms`."""
        return self.rule.norms_from_parts(kept[0], readings)

    def to_leaf(self, total: Array) -> Array:
        """See `StreamedLeaf.to_leaf`."""
        return total

    def tell(self, message: Message, kept: list[Factors], readings: Any = None) -> Message:
        """See `StreamedLeaf.tell`."""
        if readings is not None:
            message = message._replace(norms=(self.squared_norms(readings, kept),))
        (indices,), cotangent = kept[0]
        # An index beyond the table stays beyond it, and becomes one that float32 holds exactly.
        indices = jnp.clip(indices.astype(jnp.float32), -1, self.spec.shape[0])
        return message._replace(lookup=(indices, cotangent))

    def _of_lookup(self, message: Message) -> Factors:
        indices, cotangent = message.lookup
        return Factors((indices.astype(jnp.int32),), cotangent)


def tied_leaf(sites: list[Site], spec: jax.ShapeDtypeStruct, rule: NormRule) -> StreamedLeaf | None:
    """Returns the streamed form of a tied table, or None if both uses must be kept."""
    if not isinstance(rule, TiedEmbedding):
        return None
    lookup, head = sites[rule.lookup], sites[1 - rule.lookup]
    streamable = (
        not head.scans
        and not any(site.in_cond or site.output_window is not None for site in sites)
        and jnp.issubdtype(head.operands[0].dtype, jnp.floating)
        and math.prod(spec.shape[:1]) <= MAX_ROWS
    )
    return TiedLeaf(spec, head, rule, lookup) if streamable else None
