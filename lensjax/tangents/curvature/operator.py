"""Products of a loss's Hessian or Gauss-Newton matrix with vectors: for any function, language models, many batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lensjax_kernels import rademacher_like

from lensjax.environment import require_exact_backend
from lensjax.errors import InputError
from lensjax.tangents.curvature.losses import model_loss, split_loss_args
from lensjax.tangents.curvature.problem import (
    Batches,
    CurvatureProblem,
    Leaves,
    Matrix,
    check_finite,
    check_like,
    check_parameters,
    check_scalar,
    check_weight,
    iterate_batches,
    make_curvature_problem,
)
from lensjax.tangents.differentiation import gauss_newton_map, hessian_product
from lensjax.tangents.language_models import is_model, shift_args
from lensjax.tangents.parameters import ByLayer, Select, leaf_names, without_frozen
from lensjax.tangents.program.compile_cache import cached_compile


def hvp(f: Any, params: Any, v: Any = None, *batch: Any) -> Any:
    """Return the Hessian of a scalar loss times a vector, forward over reverse.

    Called as ``hvp(f, params, v, *batch)`` for any function, or as ``hvp(model, v, batch)`` for a language model,
    whose loss is the mean over the batch's labelled tokens. It is not compiled: call it under `jax.jit`.

    Parameters
    ----------
    f : callable (params, *batch) -> real scalar, twice differentiable; or a language model
    params : pytree of floating-point arrays
    v : pytree like `params`
        For a model like ``nnx.state(model, nnx.Param)``.
    *batch
        Passed on to `f`.

    Returns
    -------
    pytree like `params`; unit: loss / parameter^2 * unit of `v`.

    Raises
    ------
    InputError
        If there are no parameters, some are not real floating-point arrays, `v` is not like `params`, or the loss is
        not a real scalar.

    References
    ----------
    Pearlmutter 1994, Fast exact multiplication by the Hessian, doi:10.1162/neco.1994.6.1.147.
    """
    require_exact_backend()
    if is_model(f):
        v, *own = shift_args(f, params, v, *(batch or (None,)))
        (f, params), batch = model_loss(f), tuple(own)
    check_parameters(leaf_names(params), jax.tree.leaves(params))
    check_like(params, v)
    check_scalar(lambda p: f(p, *batch), params)
    return hessian_product(lambda p: f(p, *batch), params, v)


def gauss_newton_product(
    outputs: Callable[..., Any], loss: Callable[..., Any], params: Any, v: Any, *batch: Any
) -> Any:
    """Return the Gauss-Newton matrix J^T H_out J of ``loss(outputs(params, *batch), *batch)`` times a vector.

    It is the Hessian without the curvature of `outputs`, and positive semi-definite where `loss` is convex in them.

    Parameters
    ----------
    outputs : callable (params, *batch) -> pytree of real arrays
        J is its Jacobian.
    loss : callable (outputs, *batch) -> real scalar
        H_out is its Hessian with respect to the outputs.
    params : pytree of floating-point arrays
    v : pytree like `params`
    *batch
        Passed on to both.

    Returns
    -------
    pytree like `params`.

    Raises
    ------
    InputError
        As `hvp`.

    References
    ----------
    Schraudolph 2002, Fast curvature matrix-vector products, doi:10.1162/08997660260028683.
    """
    require_exact_backend()
    check_parameters(leaf_names(params), jax.tree.leaves(params))
    check_like(params, v)
    check_scalar(lambda p: loss(outputs(p, *batch), *batch), params)
    return gauss_newton_map(
        lambda p: outputs(p, *batch), lambda z, dz: hessian_product(lambda y: loss(y, *batch), z, dz), params
    )(v)


class CurvatureOperator:
    """The Hessian or Gauss-Newton matrix of a mean loss over batches, as a linear operator.

    Attributes
    ----------
    size : int
        Number of selected parameters.
    blocks : tuple of str
        Names of the parameter blocks.
    matvecs : int
        Products so far, each over all batches.
    """

    def __init__(self, problem: CurvatureProblem, f: Any, params: Any, batches: Sequence[Any]) -> None:
        self.problem, self._params, self._batches = problem, params, batches
        self._function = f  # the program holds it weakly
        self.size = sum(leaf.size for leaf in problem.selected(params))
        self.blocks = problem.block_names
        self.matvecs = 0

        def make(get: Callable[[], Any]) -> Any:
            def product(params: Any, batch: Any, v: Leaves) -> tuple[Leaves, jax.Array]:
                multiply, weight = problem.product_fn(get(), params, batch)
                return multiply(v), weight

            return jax.jit(product)

        self._product = cached_compile(f, ("product", problem), make)

    def __matmul__(self, v: Any) -> Any:
        """Return the matrix times a vector.

        Parameters
        ----------
        v : pytree like the parameters
            Leaves that are not selected are ignored.

        Returns
        -------
        pytree like the parameters, zero in leaves that are not selected.

        Raises
        ------
        InputError
            If `v` is not like the parameters, or the batches have no weight.
        """
        check_like(without_frozen(self._params), v)
        return self._like_parameters(self.multiply(self.problem.selected(v)))

    def multiply(self, v: Leaves) -> Leaves:
        """Return the product with a list of the selected leaves."""
        sums: Leaves | None = None
        total = jnp.zeros(())
        for batch in self._batches:
            product, weight = self._product(self._params, batch, v)
            total = total + weight
            sums = product if sums is None else [a + b for a, b in zip(sums, product, strict=True)]
        assert sums is not None
        self.matvecs += 1
        check_weight(float(total))
        return [(a / total).astype(a.dtype) for a in sums]

    def quadratic(self, v: Any) -> dict[str, float]:
        """Return v_i . (H v)_i of each block i; the sum over blocks is v . H v.

        Parameters
        ----------
        v : pytree like the parameters

        Raises
        ------
        InputError
            As for the product.
        """
        check_like(without_frozen(self._params), v)
        selected = self.problem.selected(v)
        numbers = np.asarray(self.problem.block_products(selected, self.multiply(selected)), np.float64)
        check_finite(numbers, self.problem.block_names, "the product with the given vector")
        return dict(zip(self.blocks, numbers.tolist(), strict=True))

    def flat(self, v: jax.Array) -> jax.Array:
        """Return the product with a flat vector (size,), as from `flatten`."""
        return concatenate_leaves(self.multiply(self.unflatten(v)))

    def block_sizes(self) -> dict[str, int]:
        """Return how many parameters each block has."""
        sizes, layers = dict.fromkeys(self.blocks, 0), self.problem.selection.selected_layers
        for leaf, block in zip(self.problem.selected(self._params), layers, strict=True):
            sizes[self.blocks[block]] += int(leaf.size)
        return sizes

    def flatten(self, v: Any) -> jax.Array:
        """Return the selected leaves of a pytree like the parameters as one vector (size,), at least float32."""
        check_like(without_frozen(self._params), v)
        return concatenate_leaves(self.problem.selected(v))

    def rademacher(self, key: jax.Array) -> Any:
        """Return a random sign for each selected parameter, zero for the others; a pytree like the parameters."""
        return self._like_parameters(rademacher_like(key, self.problem.selected(self._params)))

    def unflatten(self, v: jax.Array) -> Leaves:
        """Split a flat vector (size,) into the selected leaves."""
        return split_like(v, self.problem.selected(self._params))

    def _like_parameters(self, selected: Leaves) -> Any:
        """Return a pytree like the parameters, zero in leaves that are not selected."""
        return self.problem.selection.replace(without_frozen(self._params), selected, jnp.zeros_like)


def concatenate_leaves(leaves: Leaves) -> jax.Array:
    """Return arrays as one vector, each in row-major order, at least float32, which a basis needs."""
    vector = jnp.concatenate([jnp.ravel(a) for a in leaves])
    return vector.astype(jnp.promote_types(jnp.float32, vector.dtype))


def split_like(v: jax.Array, like: Leaves) -> Leaves:
    """Split a flat vector into arrays like the given ones."""
    leaves, start = [], 0
    for leaf in like:
        leaves.append(v[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        start += leaf.size
    return leaves


def curvature_operator(
    f: Any,
    params: Any,
    batches: Batches = None,
    *,
    matrix: Matrix = "hessian",
    parameters: Select = None,
    by_layer: ByLayer = True,
    weight: Callable[[Any], Any] | None = None,
) -> CurvatureOperator:
    """Return the Hessian or Gauss-Newton matrix of a loss over many batches as a linear operator.

    Called as ``curvature_operator(f, params, batches)``, or as ``curvature_operator(model, batches)``.

    Parameters
    ----------
    f : callable (params, batch) -> real scalar, the mean loss of a batch; `Composed`; or a language model
        The Gauss-Newton matrix is defined for `Composed(outputs, loss)` and models. A model's loss is the mean
        cross-entropy over labelled tokens, and its outputs are the logits, which never all exist at once.
    params : pytree of arrays
    batches : pytree, or list of pytrees
        One batch, or several whose matrices are averaged.
    matrix : {"hessian", "gauss_newton"}
    parameters : predicate or patterns, optional
        Which parameters are selected, as in `ntk`; the others are constants.
    by_layer : bool, "parameter", or callable path -> block name
        Blocks of parameters. True: a block is a path without its last part ("layers.0.mlp_in"); False: one block.
    weight : callable batch -> number, optional
        Weight of a batch in the mean. Default: labelled tokens for models, else the length of the first axis of the
        batch's first leaf.

    Returns
    -------
    CurvatureOperator

    Raises
    ------
    InputError
        If there are no parameters or batches, a selected parameter is not a real floating-point array, `batches`
        can be read only once, or `f` has no Gauss-Newton matrix; at the first product, if the loss is not a real
        scalar.
    """
    f, params, batches = split_loss_args(f, params, batches)
    problem = make_curvature_problem(f, params, matrix, parameters, by_layer, weight)
    if isinstance(batches, Iterator):
        raise InputError("batches is an iterator, but every product reads them all again; give a list.")
    return CurvatureOperator(problem, f, params, list(iterate_batches(batches)))
