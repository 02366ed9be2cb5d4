"""The kernel as a linear operator: its products with vectors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from lensjax_kernels.gram import pad_axis

from lensjax.environment import require_exact_backend
from lensjax.errors import InputError
from lensjax.tangents.differentiation import jvp
from lensjax.tangents.kernel.problem import KernelProblem, make_problem
from lensjax.tangents.language_models import split_model_args
from lensjax.tangents.parameters import Select, abstract, one_example


class NtkOperator:
    """A kernel as a linear operator: `K @ v` costs one vector-Jacobian and one Jacobian-vector product.

    Attributes
    ----------
    shape : (N, C, M, C)
        C outputs for each example; `v` is (M, C) and the product (N, C). Without C where f returns one number without
        axes.
    """

    def __init__(
        self, problem: KernelProblem, params: Any, x1: Any, x2: Any, layer: int | None = None, batch: int = 64
    ) -> None:
        columns = problem.rows if problem.columns is None else problem.columns
        count = () if problem.scalar else (problem.outputs,)
        self.shape = (problem.rows, *count, columns, *count)
        self._problem, self._params, self._x1, self._x2, self._layer = problem, params, x1, x2, layer
        self._batch = batch
        self._product = jax.jit(self._multiply, static_argnames="transposed")

    def __matmul__(self, v: jax.Array) -> jax.Array:
        """Return the kernel times a vector."""
        return self._apply(v, False)

    def rmatvec(self, v: jax.Array) -> jax.Array:
        """Return the transposed kernel times a vector: (N, C) -> (M, C)."""
        return self._apply(v, True)

    def dense(self, chunk: int = 16) -> jax.Array:
        """Return the kernel as an array, by one product for each column, `chunk` of them at a time."""
        inside = self.shape[len(self.shape) // 2 :]
        size = 1
        for n in inside:
            size *= n
        eye = jnp.eye(size, dtype=self._dtype()).reshape(size, *inside)
        columns = jax.lax.map(lambda v: self @ v, eye, batch_size=chunk)
        return jnp.moveaxis(columns, 0, -1).reshape(self.shape)

    def _dtype(self) -> Any:
        problem = self._problem
        return jnp.result_type(
            *jax.tree.leaves(jax.eval_shape(problem.function, abstract(self._params), one_example(self._x1)))
        )

    def _apply(self, v: jax.Array, transposed: bool) -> jax.Array:
        half = len(self.shape) // 2
        expected = self.shape[:half] if transposed else self.shape[half:]
        given = getattr(v, "shape", None)
        if given != expected:
            what, remedy = (
                (given, "reshape it") if given is not None else (f"a {type(v).__name__}", "give jnp.asarray(v)")
            )
            raise InputError(f"The kernel {self.shape} multiplies arrays of shape {expected}, not {what}; {remedy}.")
        return self._product(v, self._params, self._x1, self._x2, transposed=transposed)

    def _multiply(self, v: jax.Array, params: Any, x1: Any, x2: Any, transposed: bool) -> jax.Array:
        problem = self._problem
        selected = problem.selected(params)
        layers = [n for n in problem.selection.layers if n is not None]
        x2 = x1 if x2 is None else x2
        x1, x2 = (x2, x1) if transposed else (x1, x2)

        def outputs_on(x: Any) -> Any:
            return lambda selected: jax.vmap(lambda one: problem.flat_outputs(params, selected, one))(x)

        def add_batch_vjp(total: list[jax.Array], batch: tuple[jax.Array, jax.Array]) -> tuple[list[jax.Array], None]:
            y, vjp = jax.vjp(outputs_on(jax.tree.map(lambda a: a[batch[0]], x2)), selected)
            (own,) = vjp(batch[1].reshape(y.shape).astype(y.dtype))
            return [a + b.astype(a.dtype) for a, b in zip(total, own, strict=True)], None

        def batch_jvp(places: jax.Array) -> jax.Array:
            return jvp(outputs_on(jax.tree.map(lambda a: a[places], x1)), selected, direction)

        columns = self._batches(len(v))
        # The last batch is filled up with copies of the last example, whose weights are 0.
        weights = pad_axis(v, 0, columns.size - len(v)).reshape(*columns.shape, *v.shape[1:])
        start = [jnp.zeros(a.shape, jnp.promote_types(jnp.float32, a.dtype)) for a in selected]
        sums = jax.lax.scan(add_batch_vjp, start, (columns, weights))[0]
        direction = [s.astype(a.dtype) for s, a in zip(sums, selected, strict=True)]
        if self._layer is not None:
            direction = [d if n == self._layer else jnp.zeros_like(d) for d, n in zip(direction, layers, strict=True)]
        count = self.shape[len(self.shape) // 2] if transposed else self.shape[0]
        out = jax.lax.map(batch_jvp, self._batches(count))
        out = out.reshape(-1, out.shape[-1])[:count]
        return out[:, 0] if problem.scalar else out

    def _batches(self, examples: int) -> jax.Array:
        """Return the indices of the examples of each batch, (batches, examples of a batch)."""
        size = min(self._batch, examples)
        return jnp.minimum(jnp.arange(-(-examples // size) * size), examples - 1).reshape(-1, size)


def ntk_operator(
    f: Any,
    params: Any,
    x1: Any = None,
    x2: Any = None,
    *,
    output: str = "loss",
    parameters: Select = None,
    batch: int = 64,
) -> NtkOperator:
    """Return the kernel as a linear operator, which never holds it: for N where even the kernel is too large.

    Parameters
    ----------
    f, params, x1, x2, output, parameters : as in `lensjax.tangents.ntk`
    batch : int
        Examples in one call of the function.

    Returns
    -------
    NtkOperator

    Raises
    ------
    InputError, UnsupportedBackendError : as `lensjax.tangents.ntk`; InputError also if `batch` is below 1

    Notes
    -----
    A product takes the memory of one gradient over `batch` examples, however many there are. It is all that a solver
    such as `jax.scipy.sparse.linalg.cg(lambda v: operator @ v, y)` needs.
    """
    require_exact_backend()
    if batch < 1:
        raise InputError(f"batch={batch} must be at least 1.")
    f, params, x1, x2 = split_model_args(f, output, params, x1, x2)
    return NtkOperator(make_problem(f, params, x1, x2, parameters, False), params, x1, x2, batch=batch)
