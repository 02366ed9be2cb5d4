"""Kernels of thousands of examples: block by block, in bounded memory, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lensjax.errors import InputError
from lensjax.tangents.memory import needed_bytes
from lensjax.tangents.models import is_model, model_function
from lensjax.tangents.ntk import Outputs, checked, ntk
from lensjax.tangents.problem import Problem, Select, compiled

LARGEST_BLOCK = 1024


def ntk_blocks(
    f: Any,
    params: Any,
    x1: Any = None,
    x2: Any = None,
    *,
    output: str = "loss",
    parameters: Select = None,
    outputs: Outputs = "full",
    block: int | None = None,
    memory: int | None = None,
    file: str | os.PathLike[str] | None = None,
) -> np.ndarray:
    """Return the kernel of many examples, computed a block of rows and columns at a time.

    Parameters
    ----------
    f, params, x1, x2, output, parameters, outputs : as in `lensjax.tangents.ntk`
    block : int, optional
        Examples on each side of a block.
    memory : int, optional
        Bytes that the computation of one block may take beside the parameters, the examples and the kernel; the block
        is then as large as the compiled program's own account of its memory allows. Give `block` or `memory`, or
        neither for blocks of 64.
    file : path, optional
        Where the kernel is written as a NumPy array (.npy), block by block; `<file>.json` beside it lists the blocks
        that are there. Called again with the same function, parameters and examples, only the missing ones are
        computed. The function itself is compared by its traced program.

    Returns
    -------
    numpy array, shaped as in `ntk`; a memory map where `file` is given. Symmetric kernels are computed on one side of
    the diagonal.

    Raises
    ------
    InputError
        If `memory` is too small for two examples on a side, both `block` and `memory` are given, or `file` holds
        another computation's blocks; else as `ntk`.
    """
    if is_model(f):
        f, params, x1, x2 = (*model_function(f, output), params, x1)
    problem = checked(f, params, x1, x2, parameters, False, outputs=outputs)
    if block is not None and memory is not None:
        raise InputError(f"block={block} and memory={memory} are two ways to say the same; give one of them.")
    rows, columns = problem.rows, problem.columns or problem.rows
    if memory is not None:
        block = block_for(f, params, x1, memory, parameters=parameters, outputs=outputs)
    block = min(64 if block is None else block, max(rows, columns))
    if block < 1:
        raise InputError(f"block={block} must be at least 1 example.")
    options: dict[str, Any] = {"parameters": parameters, "outputs": outputs}
    inner = _outputs_shape(problem, outputs)
    shape = _placed(rows, columns, inner, outputs)
    dtype = np.dtype(jnp.result_type(jnp.float32, *(leaf.dtype for leaf in problem.chosen(params))))
    store = _Store(file, shape, dtype, lambda: _fingerprint(problem, params, x1, x2, outputs, block))
    for i, j in _pairs(rows, columns, block, symmetric=x2 is None):
        if (i, j) in store.done:
            continue
        left, size_i = _part(x1, i, block)
        if x2 is None and i == j:
            kernel, size_j = np.asarray(ntk(f, params, left, **options)), size_i
        else:
            right, size_j = _part(x1 if x2 is None else x2, j, block)
            kernel = np.asarray(ntk(f, params, left, right, **options))
        kernel = _cut(kernel, size_i, size_j, inner, outputs)
        here = _index(slice(i, i + size_i), slice(j, j + size_j), inner, outputs)
        store.array[here] = kernel
        if x2 is None and i != j:
            there = _index(slice(j, j + size_j), slice(i, i + size_i), inner, outputs)
            store.array[there] = _transposed(kernel, inner, outputs)
        store.finish((i, j))
    return store.array


def block_for(f: Any, params: Any, x: Any, memory: int, *, parameters: Select = None, outputs: Outputs = "full") -> int:
    """Return the largest block of examples whose computation stays within `memory` bytes.

    Programs for two small blocks are compiled and asked how much memory they take; the block follows from these, is
    compiled and asked too, and made smaller until it fits.

    Raises
    ------
    InputError
        If blocks of two examples do not fit.
    """
    total = jax.tree.leaves(x)[0].shape[0]

    def make(get: Callable[[], Any]) -> Any:
        def run(params: Any, x1: Any, x2: Any) -> Any:
            return ntk(get(), params, x1, x2, method="transform", parameters=parameters, outputs=outputs)

        return jax.jit(run)

    program = compiled(f, ("block", parameters, outputs), make)

    def needed(block: int) -> int:
        part = jax.tree.map(lambda a: jax.ShapeDtypeStruct((block, *a.shape[1:]), a.dtype), x)
        return needed_bytes(program, params, part, part)

    small, larger = 2, 8
    of_small, of_larger = needed(small), needed(larger)
    if of_small > memory:
        raise InputError(
            f"memory={memory} bytes is too little: a block of {small} examples takes {of_small}; "
            "allow more, or choose fewer parameters with `parameters`."
        )
    each = max(1.0, (of_larger - of_small) / (larger - small))
    block = min(int(small + (memory - of_small) / each), total, LARGEST_BLOCK)
    while block > small and needed(block) > memory:
        block = max(small, int(block * 0.8))
    return max(1, block)


class _Store:
    """The kernel so far, in memory or in a file with a list of finished blocks beside it."""

    def __init__(self, file: Any, shape: tuple[int, ...], dtype: np.dtype, fingerprint: Any) -> None:
        self.done: set[tuple[int, int]] = set()
        self.list: Path | None = None
        if file is None:
            self.array: np.ndarray = np.empty(shape, dtype)
            return
        path = Path(file)
        self.list = path.with_name(path.name + ".json")
        self.fingerprint = fingerprint()
        if path.exists() != self.list.exists():
            raise InputError(f"{path} and {self.list} belong together, but one is missing; remove the other.")
        if not path.exists():
            self.array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
            self._write()
            return
        kept = json.loads(self.list.read_text())
        if kept["fingerprint"] != self.fingerprint:
            raise InputError(
                f"{path} holds blocks of another function, parameters, examples or block size; give another file."
            )
        self.array = np.lib.format.open_memmap(path, mode="r+")
        self.done = {(i, j) for i, j in kept["done"]}

    def finish(self, pair: tuple[int, int]) -> None:
        self.done.add(pair)
        if self.list is not None:
            assert isinstance(self.array, np.memmap)
            self.array.flush()  # the block must be there before the list says so
            self._write()

    def _write(self) -> None:
        assert self.list is not None
        new = self.list.with_name(self.list.name + ".new")
        new.write_text(json.dumps({"fingerprint": self.fingerprint, "done": sorted(self.done)}))
        new.replace(self.list)


def _fingerprint(problem: Problem, params: Any, x1: Any, x2: Any, outputs: str, block: int) -> str:
    digest = hashlib.sha256()
    closed = jax.make_jaxpr(problem.function)(params, jax.tree.map(lambda a: a[0], x1))
    facts = (str(closed.jaxpr), problem.names, problem.layers, problem.rows, problem.columns, outputs, block)
    digest.update(repr(facts).encode())
    for leaf in jax.tree.leaves((closed.consts, params, x1, x2)):
        array = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        digest.update(np.ascontiguousarray(array).view(np.uint8).data if np.size(array) else b"")
    return digest.hexdigest()


def _pairs(rows: int, columns: int, block: int, symmetric: bool) -> Iterator[tuple[int, int]]:
    for i in range(0, rows, block):
        for j in range(i if symmetric else 0, columns, block):
            yield i, j


def _part(x: Any, start: int, block: int) -> tuple[Any, int]:
    """Return one block of examples, the last example repeated where they end, and how many there really are."""
    size = min(block, jax.tree.leaves(x)[0].shape[0] - start)
    places = np.minimum(np.arange(start, start + block), start + size - 1)
    return jax.tree.map(lambda a: a[places], x), size


def _outputs_shape(problem: Problem, outputs: str) -> tuple[int, ...]:
    return () if problem.scalar or outputs == "trace" else (problem.outputs,)


def _placed(rows: int, columns: int, inner: tuple[int, ...], outputs: str) -> tuple[int, ...]:
    return (rows, *inner, columns, *inner) if outputs == "full" else (rows, columns, *inner)


def _index(rows: slice, columns: slice, inner: tuple[int, ...], outputs: str) -> tuple[slice, ...]:
    full = outputs == "full" and inner
    return (rows, slice(None), columns) if full else (rows, columns)


def _cut(kernel: np.ndarray, rows: int, columns: int, inner: tuple[int, ...], outputs: str) -> np.ndarray:
    return kernel[_index(slice(rows), slice(columns), inner, outputs)]


def _transposed(kernel: np.ndarray, inner: tuple[int, ...], outputs: str) -> np.ndarray:
    if outputs == "full" and inner:
        return kernel.transpose(2, 3, 0, 1)
    return kernel.swapaxes(0, 1)
