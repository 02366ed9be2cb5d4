"""The numerical primitives that lensjax spends most of its time in: plain JAX, and Pallas for GPUs."""

from lensjax_kernels.cross_entropy import head_cross_entropy
from lensjax_kernels.cross_entropy_gram import cross_entropy_vjp, cross_entropy_vjp_token_gram, head_losses
from lensjax_kernels.gram import (
    crossed_gram,
    reduce_products,
    reduce_weight_gradients,
    row_gram,
    token_gram,
    weighted_gram,
)
from lensjax_kernels.rademacher import pack_rademacher, rademacher_like, unpack_rademacher

__all__ = [
    "cross_entropy_vjp",
    "cross_entropy_vjp_token_gram",
    "crossed_gram",
    "head_cross_entropy",
    "head_losses",
    "pack_rademacher",
    "rademacher_like",
    "reduce_products",
    "reduce_weight_gradients",
    "row_gram",
    "token_gram",
    "unpack_rademacher",
    "weighted_gram",
]
