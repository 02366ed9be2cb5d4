"""Products of a loss's Hessian or Gauss-Newton matrix with vectors: for any function, language models, many batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from lensjax_kernels import random_signs_like

from lensjax.environment import require_exact_backend
from lensjax.errors import InputError
from lensjax.tangents.curvature.losses import Composed, ModelLoss, opened_loss, with_frozen, without_frozen
from lensjax.tangents.curvature.quadratic_forms import dot, gauss_newton_forms, hessian_forms
from lensjax.tangents.differentiation import hessian_product, sandwich
from lensjax.tangents.language_models import is_model
from lensjax.tangents.parameters import ByLayer, Select, abstract, layer_name, leaf_names, selection
from lensjax.tangents.program.compile_cache import compiled

Matrix = Literal["hessian", "gauss_newton"]
Leaves = list[jax.Array]
Batches = Any
"""One batch (any pytree but a list), a list of batches, or an iterator over them."""


def hvp(f: Any, params: Any, v: Any = None, *batch: Any) -> Any:
    """Return the Hessian of a scalar loss times a vector, forward over reverse.

    Called as ``hvp(f, params, v, *batch)`` for any function, or as ``hvp(model, v, batch)`` for a language model,
    whose loss is the mean over the batch's labelled tokens. Never compiled here: put it under `jax.jit`.

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
        f, params, v, *own = opened_loss(f, params, v, *(batch or (None,)))
        batch = tuple(own)
    _check_params(leaf_names(params), jax.tree.leaves(params))
    _check_like(params, v)
    _check_scalar(lambda p: f(p, *batch), params)
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
    _check_params(leaf_names(params), jax.tree.leaves(params))
    _check_like(params, v)
    _check_scalar(lambda p: loss(outputs(p, *batch), *batch), params)
    return sandwich(
        lambda p: outputs(p, *batch), lambda z, dz: hessian_product(lambda y: loss(y, *batch), z, dz), params
    )(v)


def _check_params(names: Sequence[str], leaves: Sequence[Any]) -> None:
    if not leaves:
        raise InputError("params holds no array; give the parameters whose curvature is wanted.")
    wrong = [f"{n} ({_dtype(a)})" for n, a in zip(names, leaves, strict=True) if not _is_real_float(a)]
    if wrong:
        raise InputError(
            f"params: {', '.join(wrong[:4])} cannot be differentiated; leave such leaves out (parameters=...) or cast "
            "them to a floating-point dtype."
        )


def _dtype(leaf: Any) -> Any:
    return getattr(leaf, "dtype", type(leaf).__name__)


def _is_real_float(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _check_like(params: Any, v: Any) -> None:
    def kinds(tree: Any) -> list[Any]:
        return [(jnp.shape(a), jnp.result_type(a)) for a in jax.tree.leaves(tree)]

    if not same_structure(params, v) or kinds(params) != kinds(v):
        raise InputError("v must have the structure, shapes and dtypes of params; make it by jax.tree.map over params.")


def same_structure(a: Any, b: Any) -> bool:
    """Whether two pytrees have the same structure."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (a, b)]
    return bool(structures[0] == structures[1])


def _check_scalar(f: Callable[[Any], Any], params: Any) -> None:
    out = jax.eval_shape(f, abstract(params))
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1 or leaves[0].shape != () or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        raise InputError(
            f"f must return one real number, not {[f'{a.dtype}{list(a.shape)}' for a in leaves]}; take the mean of its "
            "losses."
        )


@dataclasses.dataclass(frozen=True)
class Facts:
    """Static facts of a curvature computation.

    Attributes
    ----------
    matrix : {"hessian", "gauss_newton"}
    names : path of each parameter leaf
    blocks : number of each leaf's block, None where the leaf is held constant
    block_names : name of each block
    weight : callable batch -> number, or None: labelled tokens for models, else the length of the first axis
    """

    matrix: Matrix
    names: tuple[str, ...]
    blocks: tuple[int | None, ...]
    block_names: tuple[str, ...]
    weight: Callable[[Any], Any] | None

    def chosen(self, params: Any) -> Leaves:
        """Return the leaves that count."""
        return [leaf for leaf, b in zip(jax.tree.leaves(params), self.blocks, strict=True) if b is not None]

    def replaced(self, params: Any, chosen: Sequence[Any], rest: Any = None) -> Any:
        """Return `params` with the leaves that count replaced, and the others too if `rest` is given."""
        leaves, structure = jax.tree.flatten(params)
        values = iter(chosen)
        kept = [leaf if rest is None else rest(leaf) for leaf in leaves]
        new = [old if b is None else next(values) for old, b in zip(kept, self.blocks, strict=True)]
        return jax.tree.unflatten(structure, new)

    def block_sums(self, numbers: Sequence[jax.Array]) -> jax.Array:
        """Add one number for each leaf that counts up to one for each block, (blocks,)."""
        own = [b for b in self.blocks if b is not None]
        return jnp.stack(
            [sum(x for x, b in zip(numbers, own, strict=True) if b == k) for k in range(len(self.block_names))]
        )

    def block_products(self, v: Leaves, w: Leaves) -> jax.Array:
        """Return v_i . w_i of each block i, (blocks,), at least float32."""
        return self.block_sums([dot(a, b) for a, b in zip(v, w, strict=True)])

    def prepare(self, f: Any, params: Any, batch: Any) -> tuple[Callable[[Leaves], Leaves], jax.Array]:
        """Return v -> (weight of the batch) * (matrix of the batch) @ v over the leaves that count, and the weight."""
        chosen = self.chosen(params)
        if self.matrix == "hessian":
            loss, weight = self._loss(f, params, batch)
            return (lambda v: hessian_product(loss, chosen, v)), weight
        outputs, middle, scale, weight = self._parts(f, params, batch)
        product = sandwich(outputs, middle, chosen)
        return (lambda v: [(scale * w).astype(w.dtype) for w in product(v)]), weight

    def prepare_forms(self, f: Any, params: Any, batch: Any) -> tuple[Callable[[Leaves], jax.Array], jax.Array]:
        """Return v -> (weight of the batch) * v_i . (matrix of the batch @ v)_i of each block, and the weight."""
        chosen = self.chosen(params)
        if self.matrix == "hessian":
            loss, weight = self._loss(f, params, batch)
            find, scale = functools.partial(hessian_forms, loss, chosen), 1.0
        else:
            outputs, middle, scale, weight = self._parts(f, params, batch)
            find = functools.partial(gauss_newton_forms, outputs, middle, chosen)

        def forms(v: Leaves) -> jax.Array:
            found = find(v)
            if found is None:
                return self.block_products(v, self.prepare(f, params, batch)[0](v))
            return scale * self.block_sums(found)

        return forms, weight

    def _scale(self, f: Any, batch: Any) -> tuple[Any, jax.Array]:
        """Return what a batch's loss is multiplied with, and the weight of the batch."""
        weight = self.weigh(f, batch)
        if not isinstance(f, ModelLoss):
            return weight, weight
        # A model is differentiated as a sum: its mean over a batch without labelled tokens is 0 / 0.
        return 1.0 if self.weight is None else weight / jnp.maximum(f.tokens(batch), 1), weight

    def _loss(self, f: Any, params: Any, batch: Any) -> tuple[Callable[[Leaves], Any], jax.Array]:
        """Return the loss of a batch, times its weight, as a function of the leaves that count; and the weight."""
        scale, weight = self._scale(f, batch)
        if isinstance(f, ModelLoss):
            return (lambda leaves: scale * f.sums(self.replaced(params, leaves), batch)[0]), weight
        _check_scalar(lambda p: f(p, batch), params)  # here, where it is traced, and not at every call
        return (lambda leaves: scale * f(self.replaced(params, leaves), batch)), weight

    def _parts(self, f: Any, params: Any, batch: Any) -> tuple[Any, Any, Any, jax.Array]:
        """Return outputs of the leaves that count, the loss's curvature (z, dz) -> H_out dz, the scale, the weight."""
        scale, weight = self._scale(f, batch)
        if not isinstance(f, ModelLoss):
            _check_scalar(lambda p: f(p, batch), params)

        def outputs(leaves: Leaves) -> Any:
            own = self.replaced(params, leaves)
            return f.head_inputs(own, batch) if isinstance(f, ModelLoss) else f.outputs(own, batch)

        def middle(z: Any, dz: Any) -> Any:
            if isinstance(f, ModelLoss):
                return f.head_gauss_newton(batch, z, dz)
            return hessian_product(lambda y: f.loss(y, batch), z, dz)

        return outputs, middle, scale, weight

    def weigh(self, f: Any, batch: Any) -> jax.Array:
        """Return the weight of a batch."""
        if self.weight is not None:
            return jnp.asarray(self.weight(batch), jnp.result_type(float))
        if isinstance(f, ModelLoss):
            return jnp.asarray(f.tokens(batch), jnp.result_type(float))
        shapes = [jnp.shape(a) for a in jax.tree.leaves(batch)]
        return jnp.asarray(shapes[0][0] if shapes and shapes[0] else 1, jnp.result_type(float))


def facts_of(
    f: Any, params: Any, matrix: Matrix, parameters: Select, by_layer: ByLayer, weight: Callable[[Any], Any] | None
) -> Facts:
    """Check what is common to all public functions and collect it; raises what `CurvatureOperator` does."""
    require_exact_backend()
    if matrix not in ("hessian", "gauss_newton"):
        raise InputError(f"matrix={matrix!r} is not known; choose 'hessian' or 'gauss_newton'.")
    if not callable(f):
        raise InputError(f"f must be a function of (params, batch) or a language model, not {type(f).__name__}.")
    if matrix == "gauss_newton" and not isinstance(f, ModelLoss | Composed):
        raise InputError(
            "matrix='gauss_newton' needs the loss in two parts: give Composed(outputs, loss) or a language model."
        )
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    chosen = selection(parameters, names, leaves) if leaves else []
    if leaves and not any(chosen):
        raise InputError(
            f"parameters={parameters!r} selects none of the {len(names)} parameters ({', '.join(names[:8])}, ...)."
        )
    counted = [(n, a) for n, a, c in zip(names, leaves, chosen, strict=True) if c]
    _check_params([n for n, _ in counted], [a for _, a in counted])
    of_leaf = [layer_name(by_layer, n) for n in names]
    block_names = tuple(dict.fromkeys(n for n, c in zip(of_leaf, chosen, strict=True) if c))
    blocks = tuple(block_names.index(n) if c else None for n, c in zip(of_leaf, chosen, strict=True))
    return Facts(matrix, names, blocks, block_names, weight)


def stream(batches: Batches) -> Iterator[Any]:
    """Yield the batches one by one.

    Raises
    ------
    InputError
        If there is none.
    """
    count = 0
    for batch in batches if isinstance(batches, list | Iterator) else [batches]:
        count += 1
        yield batch
    if not count:
        raise InputError("batches is empty; give at least one batch.")


class CurvatureOperator:
    """The Hessian or Gauss-Newton matrix of a mean loss over batches, which is only ever multiplied with.

    Attributes
    ----------
    size : int
        Parameters that count.
    blocks : tuple of str
        Names of the parameter blocks.
    matvecs : int
        Products so far, over all batches each.
    """

    def __init__(self, facts: Facts, f: Any, params: Any, batches: Sequence[Any]) -> None:
        self.facts, self._params, self._batches = facts, params, batches
        self._kept, self._frozen = without_frozen(f)  # the program holds its function weakly
        self.size = sum(leaf.size for leaf in facts.chosen(params))
        self.blocks = facts.block_names
        self.matvecs = 0

        def make(get: Callable[[], Any]) -> Any:
            def product(params: Any, frozen: Any, batch: Any, v: Leaves) -> tuple[Leaves, jax.Array]:
                multiply, weight = facts.prepare(with_frozen(get(), frozen), params, batch)
                return multiply(v), weight

            return jax.jit(product)

        self._product = compiled(self._kept, ("product", facts), make)

    def __matmul__(self, v: Any) -> Any:
        """Return the matrix times a vector.

        Parameters
        ----------
        v : pytree like the parameters
            Leaves that do not count are not looked at.

        Returns
        -------
        pytree like the parameters, zero in leaves that do not count.

        Raises
        ------
        InputError
            If `v` is not like the parameters, or the batches weigh nothing.
        """
        _check_like(self._params, v)
        return self.facts.replaced(self._params, self.multiply(self.facts.chosen(v)), jnp.zeros_like)

    def multiply(self, v: Leaves) -> Leaves:
        """Multiply a list of the leaves that count."""
        sums: Leaves | None = None
        total = jnp.zeros(())
        for batch in self._batches:
            product, weight = self._product(self._params, self._frozen, batch, v)
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
        _check_like(self._params, v)
        chosen = self.facts.chosen(v)
        numbers = np.asarray(self.facts.block_products(chosen, self.multiply(chosen)), np.float64)
        check_finite(numbers, self.facts.block_names, "the product with the given vector")
        return dict(zip(self.blocks, numbers.tolist(), strict=True))

    def flat(self, v: jax.Array) -> jax.Array:
        """Multiply a flat vector (size,) as `flatten` makes them."""
        return join(self.multiply(self.unflatten(v)))

    def block_sizes(self) -> dict[str, int]:
        """Return how many parameters each block has."""
        own = [b for b in self.facts.blocks if b is not None]
        sizes = dict.fromkeys(self.blocks, 0)
        for leaf, block in zip(self.facts.chosen(self._params), own, strict=True):
            sizes[self.blocks[block]] += int(leaf.size)
        return sizes

    def flatten(self, v: Any) -> jax.Array:
        """Return the leaves that count of a pytree like the parameters as one vector (size,), at least float32."""
        _check_like(self._params, v)
        return join(self.facts.chosen(v))

    def random_signs(self, key: jax.Array) -> Any:
        """Return a random sign for each parameter that counts, zero for the others; a pytree like the parameters."""
        signs = random_signs_like(key, self.facts.chosen(self._params))
        return self.facts.replaced(self._params, signs, jnp.zeros_like)

    def unflatten(self, v: jax.Array) -> Leaves:
        """Cut a flat vector (size,) into the leaves that count."""
        return cut(v, self.facts.chosen(self._params))


def join(leaves: Leaves) -> jax.Array:
    """Return arrays as one vector, one after the other in row-major order, at least float32: a basis needs it."""
    vector = jnp.concatenate([jnp.ravel(a) for a in leaves])
    return vector.astype(jnp.promote_types(jnp.float32, vector.dtype))


def cut(v: jax.Array, like: Leaves) -> Leaves:
    """Cut a flat vector into arrays like the given ones."""
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
        With `Composed(outputs, loss)` or a model, the Gauss-Newton matrix exists too. A model's loss is the mean
        cross-entropy over labelled tokens, and its outputs are the logits, which never exist all at once.
    params : pytree of arrays
    batches : pytree, or list of pytrees
        One batch, or several whose matrices are averaged.
    matrix : {"hessian", "gauss_newton"}
    parameters : predicate or patterns, optional
        Which parameters count, as in `ntk`; the others are constants.
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
        If there are no parameters or batches, a parameter that counts is not a real floating-point array, `batches`
        can be read only once, or `f` has no Gauss-Newton matrix; at the first product, if the loss is not a real
        scalar.
    """
    f, params, batches = opened_loss(f, params, batches)
    facts = facts_of(f, params, matrix, parameters, by_layer, weight)
    if isinstance(batches, Iterator):
        raise InputError("batches is an iterator, but every product reads them all again; give a list.")
    return CurvatureOperator(facts, f, params, list(stream(batches)))


def check_weight(weight: float) -> None:
    """Raise InputError unless the batches weigh something."""
    if not weight > 0:
        raise InputError(f"the batches weigh {weight} in all; give batches with labelled tokens, or positive weights.")


def check_finite(numbers: np.ndarray, names: Iterable[str], what: str) -> None:
    """Raise InputError if a number (..., blocks) is not finite."""
    bad = [n for n, ok in zip(names, np.isfinite(numbers).reshape(-1, numbers.shape[-1]).all(0), strict=True) if not ok]
    if bad:
        raise InputError(
            f"{what} is not finite in {', '.join(bad[:4])}: check the parameters and the batch for NaN, and the loss "
            "for points without a second derivative."
        )
