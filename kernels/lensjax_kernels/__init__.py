"""The hot numerical primitives of lensjax: plain JAX, any device, each with one signature."""

from lensjax_kernels.cross_entropy import head_cross_entropy
from lensjax_kernels.cross_entropy_gram import head_losses, head_pull, head_pull_by_tokens
from lensjax_kernels.gram import (
    crossed_gram,
    reduce_products,
    reduce_weight_gradients,
    row_gram,
    token_gram,
    weighted_gram,
)
from lensjax_kernels.rademacher import pack_random_signs, random_signs_like, unpack_signs

__all__ = [
    "crossed_gram",
    "head_cross_entropy",
    "head_losses",
    "head_pull",
    "head_pull_by_tokens",
    "pack_random_signs",
    "random_signs_like",
    "reduce_products",
    "reduce_weight_gradients",
    "row_gram",
    "token_gram",
    "unpack_signs",
    "weighted_gram",
]
