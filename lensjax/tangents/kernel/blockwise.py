"""Kernels of thousands of examples: block by block, in bounded memory, resumable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from lensjax._files import read_json
from lensjax.errors import InputError
from lensjax.tangents.kernel.compute import Outputs, check_bounded, choose_method, layer_kernels, validate
from lensjax.tangents.kernel.memory_limit import Blocks, Variant, memory_error, plan_memory
from lensjax.tangents.kernel.problem import KernelProblem
from lensjax.tangents.kernel.reference import has_reverse_mode
from lensjax.tangents.kernel.report import NtkReport, report_of
from lensjax.tangents.language_models import frozen_as_arguments, split_model_args
from lensjax.tangents.parameters import Select
from lensjax.tangents.program import ir

WITHOUT_LIMIT = "give `ntk_blocks` a `block` instead of `memory`"


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
    return_report: bool = False,
) -> Any:
    """Return the kernel of many examples, computed a block of rows and columns at a time.

    Parameters
    ----------
    f, params, x1, x2, output, parameters, outputs : as in `lensjax.tangents.ntk`
    block : int, optional
        Examples on each side of a block.
    memory : int, optional
        Bytes that the computation of one block may take beside the parameters and the examples, by XLA's
        analysis of the compiled program, with its part of the kernel: the whole where all examples go at once.
        Blocks are as large as that allows, see `block_for`; models of `lensjax.models` run their layers in a loop and
        recompute as much of them on the way back as makes the whole fastest, see Notes. Give `block` or `memory`, or
        neither for blocks of 64 with a model as it is.
    file : path, optional
        Where the kernel is written as a NumPy array (.npy), block by block; `<file>.json` beside it lists the blocks
        that are there. Called again with the same function, parameters and examples, it computes only the missing
        ones. The function itself is compared by its traced program, and another `memory` may choose another.
    return_report : bool
        Return `(kernel, report)`; the report's reason names the blocks and what is recomputed, and its bytes are those
        of two blocks.

    Returns
    -------
    numpy array, shaped as in `ntk`; a memory map where `file` is given. Symmetric kernels are computed on one side of
    the diagonal.

    Raises
    ------
    InputError
        If `memory` is too small for two examples on a side or the function has no reverse mode, which it needs, both
        `block` and `memory` are given, it is called under `jax.jit` or `jax.grad`, or `file` holds another
        computation's blocks; else as `ntk`.

    Notes
    -----
    Each pair of blocks runs both of its sides forwards and backwards again, so N examples in blocks of b cost N^2 / b
    passes: halving the block doubles the time. Recomputing a model's layers adds a third to a pass at most and often
    allows much larger blocks. With `memory`, the choice with the fewest operations by this account is taken.
    """
    model = f
    f, params, x1, x2 = split_model_args(f, output, params, x1, x2)
    problem = validate(f, params, x1, x2, parameters, False, outputs=outputs)
    method, reason = choose_method(problem, "auto", params, x1, x2, bounded=memory is not None)
    if block is not None and memory is not None:
        raise InputError(f"block={block} and memory={memory} are two ways to say the same; give one of them.")
    longest = max(problem.rows, problem.columns or 0)
    if memory is not None:
        check_bounded(memory, method, reason, WITHOUT_LIMIT)
        choice = plan_memory(problem, model, params, x1, x2, output, outputs, memory)
        variant, how = choice.variant, choice.how
        problem, params = dataclasses.replace(problem, function=variant.function), variant.params
        block = longest if choice.block is None else choice.block
    else:
        block = min(64 if block is None else block, longest)
        how = f"in blocks of {block} examples"
    if block < 1:
        raise InputError(f"block={block} must be at least 1 example.")
    reason = f"{reason}; {how}"
    try:
        kernel, report = by_blocks(
            problem, method, reason, params, x1, x2, parameters=parameters, outputs=outputs, block=block, file=file
        )
    except jax.errors.TracerArrayConversionError:
        raise InputError(
            "ntk_blocks collects its blocks in NumPy, so that it cannot be compiled or differentiated; under jax.grad, "
            "jax.jvp or jax.jit call ntk, on as many examples at once as fit."
        ) from None
    return (kernel, report()) if return_report else kernel


def by_blocks(
    problem: KernelProblem,
    method: str,
    reason: str,
    params: Any,
    x1: Any,
    x2: Any,
    *,
    parameters: Select,
    outputs: Outputs,
    block: int,
    file: str | os.PathLike[str] | None = None,
) -> tuple[np.ndarray, Callable[[], NtkReport]]:
    """Return the kernel of a problem, all blocks by one method, and a function that makes the report."""
    f, rows, columns = problem.function, problem.rows, problem.columns or problem.rows

    def kernel_of(left: Any, right: Any) -> np.ndarray:
        own = validate(f, params, left, right, parameters, False)
        return np.asarray(layer_kernels(own, method, params, left, right, outputs)[""])

    inner = _outputs_shape(problem, outputs)
    shape = _placed(rows, columns, inner, outputs)
    dtype = np.dtype(jnp.result_type(jnp.float32, *(leaf.dtype for leaf in problem.selected(params))))
    store = _Store(file, shape, dtype, lambda: _fingerprint(problem, params, x1, x2, outputs, block))
    for i, j in _pairs(rows, columns, block, symmetric=x2 is None):
        if (i, j) in store.done:
            continue
        left, size_i = _part(x1, i, min(block, rows))
        if x2 is None and i == j:
            kernel, size_j = kernel_of(left, None), size_i
        else:
            right, size_j = _part(x1 if x2 is None else x2, j, min(block, columns))
            kernel = kernel_of(left, right)
        kernel = _cut(kernel, size_i, size_j, inner, outputs)
        here = _index(slice(i, i + size_i), slice(j, j + size_j), inner, outputs)
        store.array[here] = kernel
        if x2 is None and i != j:
            there = _index(slice(j, j + size_j), slice(i, i + size_i), inner, outputs)
            store.array[there] = _transposed(kernel, inner, outputs)
        store.finish((i, j))

    def report() -> NtkReport:
        own = dataclasses.replace(problem, rows=min(block, rows), columns=min(block, columns))
        examples = rows + (problem.columns or 0)
        return dataclasses.replace(report_of(own, method, reason, params, x1), examples=examples)

    return store.array, report


def block_for(f: Any, params: Any, x: Any, memory: int, *, parameters: Select = None, outputs: Outputs = "full") -> int:
    """Return the largest block of examples whose computation stays within `memory` bytes.

    Programs for a few blocks are compiled and their memory is read; larger ones are expected to take more. Below 16
    examples the next larger block does not fit, and above the block is at most a sixteenth smaller than the largest
    that fits. It is 1024 at most.

    Parameters
    ----------
    f, params, x, parameters, outputs : as in `lensjax.tangents.ntk`, for a function
    memory : bytes

    Raises
    ------
    InputError
        If blocks of two examples do not fit, or the function has no reverse mode.
    """
    f, params = frozen_as_arguments(f, params)
    problem = validate(f, params, x, None, parameters, False, outputs=outputs)
    check_bounded(memory, *choose_method(problem, "auto", params, x, bounded=True), WITHOUT_LIMIT)
    blocks = Blocks(problem, Variant(f, params, ""), x, None, outputs, even=False)
    block, takes = blocks.largest(memory)
    if not block:
        raise memory_error(memory, takes, blocks.least)
    return block


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
        kept = read_json(self.list, f"remove it and {path}")
        if not isinstance(kept, dict) or kept.get("fingerprint") != self.fingerprint:
            raise InputError(
                f"{path} holds blocks of another function, parameters, examples or block size; give another file."
            )
        try:
            self.array = np.lib.format.open_memmap(path, mode="r+")
            self.done = {(int(i), int(j)) for i, j in kept["done"]}
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise InputError(f"{path}: cannot be continued ({error}); remove it and {self.list}.") from error
        if self.array.shape != shape or self.array.dtype != dtype:
            raise InputError(
                f"{path} holds {self.array.dtype} {self.array.shape}, but the kernel is {np.dtype(dtype)} {shape}; "
                f"remove it and {self.list}."
            )

    def finish(self, pair: tuple[int, int]) -> None:
        self.done.add(pair)
        if self.list is not None:
            assert isinstance(self.array, np.memmap)
            self.array.flush()  # the block must be on the disk before the list names it
            self._write()

    def _write(self) -> None:
        assert self.list is not None
        new = self.list.with_name(self.list.name + ".new")
        new.write_text(json.dumps({"fingerprint": self.fingerprint, "done": sorted(self.done)}))
        new.replace(self.list)


def _fingerprint(problem: KernelProblem, params: Any, x1: Any, x2: Any, outputs: str, block: int) -> str:
    def derivative(params: Any, example: Any) -> Any:
        # The program of the gradient: a function's own rules for derivatives are in this one only.
        y, vjp = jax.vjp(lambda selected: problem.flat_outputs(params, selected, example), problem.selected(params))
        return y, vjp(jnp.ones_like(y))

    example = jax.tree.map(lambda a: a[0], x1)
    reverse = has_reverse_mode(problem, params, x1)
    closed = jax.make_jaxpr(derivative if reverse else problem.function)(params, example)
    program = re.sub("0x[0-9a-f]+", "", str(closed.jaxpr))  # addresses of functions differ between processes
    digest = hashlib.sha256()
    facts = (program, problem.selection.names, problem.selection.layers, problem.rows, problem.columns, outputs, block)
    digest.update(repr(facts).encode())
    for leaf in map(jnp.asarray, jax.tree.leaves((_constants(closed), params, x1, x2))):
        array = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        digest.update(np.ascontiguousarray(array).view(np.uint8).data if np.size(array) else b"")
    return digest.hexdigest()


def _constants(program: Any) -> list[Any]:
    """Return the arrays that a program and those that it calls close over."""
    own = program.consts if isinstance(program, ClosedJaxpr) else []
    return [*own, *(c for eqn in program.eqns for inner in ir.called(eqn) for c in _constants(inner))]


def _pairs(rows: int, columns: int, block: int, symmetric: bool) -> Iterator[tuple[int, int]]:
    for i in range(0, rows, block):
        for j in range(i if symmetric else 0, columns, block):
            yield i, j


def _part(x: Any, start: int, block: int) -> tuple[Any, int]:
    """Return one block of examples, filled up with copies of the last one, and its size without these."""
    size = min(block, jax.tree.leaves(x)[0].shape[0] - start)
    places = np.minimum(np.arange(start, start + block), start + size - 1)
    return jax.tree.map(lambda a: a[places], x), size


def _outputs_shape(problem: KernelProblem, outputs: str) -> tuple[int, ...]:
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
