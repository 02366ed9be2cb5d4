"""Reductions of per-example gradients, sums over parameters: Gram matrices, squared norms and tensor sketches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from lensjax_kernels.gram import EXACT, accumulation_dtype, gram_matrix


@dataclasses.dataclass(frozen=True)
class GramReduction:
    """Inner products between examples: the kernel.

    Attributes
    ----------
    rows : int
        The first `rows` examples are the kernel's rows.
    columns : int or None
        The examples after them are its columns; None: the rows are the columns too.
    crossed : bool
        Whether outputs of an example are paired with other outputs too.
    """

    rows: int
    columns: int | None
    crossed: bool

    @property
    def examples(self) -> int:
        """Number of examples of one run of the program."""
        return self.rows + (self.columns or 0)

    def shape(self, outputs: int) -> tuple[int, ...]:
        """Shape of a result for `outputs` outputs an example."""
        columns = self.rows if self.columns is None else self.columns
        return (self.rows, outputs, columns, outputs) if self.crossed else (outputs, self.rows, columns)

    def sides(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Split the leading axis into rows and columns."""
        return (x, x) if self.columns is None else (x[: self.rows], x[self.rows :])

    def __call__(self, gradient: jax.Array) -> jax.Array:
        """Reduce gradients (B, C, K)."""
        left, right = self.sides(gradient)
        dtype = accumulation_dtype(gradient)
        if self.columns is None and (self.crossed or gradient.shape[1] == 1):
            n, c, size = gradient.shape
            gram = gram_matrix(gradient.reshape(n * c, size))
            return gram.reshape(n, c, n, c) if self.crossed else gram[None]
        if self.crossed:
            (n, c, size), (m, k, _) = left.shape, right.shape
            left, right = left.reshape(n * c, size), right.reshape(m * k, size)
            return jnp.matmul(left, right.T, precision=EXACT, preferred_element_type=dtype).reshape(n, c, m, k)
        if left.shape[1] == 1:  # a plain product, which XLA does better on CPU than one with a batch axis of 1
            return jnp.matmul(left[:, 0], right[:, 0].T, precision=EXACT, preferred_element_type=dtype)[None]
        return jnp.einsum("ick,jck->cij", left, right, precision=EXACT, preferred_element_type=dtype)

    def arrange(self, blocks: jax.Array) -> jax.Array:
        """Turn (N, C, M, C) blocks from a token contraction into the shape of a result."""
        return blocks if self.crossed else jnp.einsum("icjc->cij", blocks)


@dataclasses.dataclass(frozen=True)
class SquaredNorm:
    """Squared norm of each example's gradient."""

    examples: int
    crossed: bool = False

    def shape(self, outputs: int) -> tuple[int, ...]:
        """Shape of a result for `outputs` outputs an example."""
        return (outputs, self.examples)

    def __call__(self, gradient: jax.Array) -> jax.Array:
        """Reduce gradients (B, C, K)."""
        return jnp.sum(jnp.square(gradient.astype(accumulation_dtype(gradient))), axis=-1).T


@dataclasses.dataclass(frozen=True)
class TensorSketch:
    """Random features whose inner products are the kernel in expectation: a tensor sketch of each gradient matrix.

    Attributes
    ----------
    examples : int
    width : int
        Number of features.

    References
    ----------
    Pham & Pagh 2013, "Fast and scalable polynomial kernels via explicit feature maps".
    """

    examples: int
    width: int
    crossed: bool = False

    def __call__(self, gradient: jax.Array) -> jax.Array:
        """Raise: a projection depends on the position of an entry in the gradient; see `hash_entries` and `sketch`."""
        raise NotImplementedError

    def shape(self, outputs: int) -> tuple[int, ...]:
        """Shape of a result for `outputs` outputs an example."""
        return (outputs, self.examples, self.width)

    def hash_entries(self, key: jax.Array, entries: int, side: str, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Return the feature and the sign that each row (`side` "left") or column ("right") of a matrix hashes to.

        Entry (i, j) hashes to the sum of the features of i and j, modulo the width, and to the product of their signs.
        """
        place, sign = jax.random.split(jax.random.fold_in(key, 0 if side == "left" else 1))
        if entries <= self.width:  # without collisions: less variance
            bucket = jax.random.permutation(place, self.width)[:entries]
        else:
            bucket = jax.random.randint(place, (entries,), 0, self.width)
        return bucket, jax.random.rademacher(sign, (entries,), dtype)

    def scatter_entries(self, x: jax.Array, bucket: jax.Array) -> jax.Array:
        """Return the sums of entries (..., K) over their features: (..., width)."""
        # With the entries as the first axis whole rows are added: several times as fast on CPU.
        rows = x.reshape(-1, x.shape[-1]).T.astype(accumulation_dtype(x))
        summed = jnp.zeros((self.width, rows.shape[1]), rows.dtype).at[bucket].add(rows)
        return summed.T.reshape(*x.shape[:-1], self.width)

    def sketch(self, gradient: jax.Array, key: jax.Array) -> jax.Array:
        """Return features (C, B, width) of vector gradients (B, C, K): signed entries summed over random features."""
        bucket, signs = self.hash_entries(key, gradient.shape[-1], "left", gradient.dtype)
        return jnp.swapaxes(self.scatter_entries(gradient * signs, bucket), 0, 1)


Reduction = GramReduction | SquaredNorm | TensorSketch
