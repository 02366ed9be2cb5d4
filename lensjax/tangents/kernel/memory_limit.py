"""Kernels within a memory limit: what a model recomputes, and how large the blocks of examples are."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import primitives as jp

from lensjax.errors import InputError
from lensjax.tangents.kernel.problem import KernelProblem, is_crossed
from lensjax.tangents.kernel.transformed import transformed_program
from lensjax.tangents.language_models import is_model, model_function
from lensjax.tangents.parameters import abstract
from lensjax.tangents.program import ir
from lensjax.tangents.program.reductions import GramReduction

EXECUTIONS = (
    ("scan", False, "layers in a loop"),
    ("scan", "dots_with_no_batch_dims_saveable", "layers in a loop, their products kept"),
    ("scan", True, "layers in a loop, recomputed on the way back"),
)
"""Values of a model's `execution` and `remat`, and a description; from fast to small."""

LARGEST_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class Variant:
    """One of several programs for the same function.

    Attributes
    ----------
    function : callable (params, example)
    params : its parameters
    what : description, "" for the function as it is
    """

    function: Any
    params: Any
    what: str


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a kernel is computed within a memory limit.

    Attributes
    ----------
    variant : Variant
    block : int or None
        Examples on each side of a block; None: all at once.
    how : description
    """

    variant: Variant
    block: int | None
    how: str


def variants(f: Any, params: Any, output: str) -> Iterator[Variant]:
    """Yield the variants of a model's output from fast to small, or the one variant of any other function."""
    if not is_model(f):
        yield Variant(f, params, "")
        return
    if not (hasattr(f, "execution") and hasattr(f, "remat")):
        yield Variant(*model_function(f, output), "")
        return
    for execution, remat, what in EXECUTIONS:
        yield Variant(*model_function(_with_execution(f, execution, remat), output), what)


def _with_execution(model: Any, execution: str, remat: bool | str) -> Any:
    """Return another module with the model's arrays that is executed as given; the caller's model is not changed."""
    from flax import nnx

    other = nnx.merge(*nnx.split(model))
    other.execution, other.remat = execution, remat
    return other


def plan_memory(
    problem: KernelProblem,
    model: Any,
    params: Any,
    x1: Any,
    x2: Any,
    output: str,
    outputs: str,
    memory: int,
    *,
    by_layer: bool = False,
) -> Choice:
    """Return how a kernel is expected to be computed fastest within a memory limit.

    The first variant that fits with all examples at once is taken. Where none does, each variant has a largest block
    that fits, and the one with the fewest operations is taken. With K blocks on each side there are K^2 / 2 pairs of
    them (all K L between two sets of examples), each of which runs both of its sides forwards and backwards again: the
    estimate is the `operations` of one pair times that number. A variant that recomputes takes up to 4/3 of them for a
    pair, and with twice the block there is a quarter of the pairs.

    Parameters
    ----------
    problem : Problem
    model : the language model whose variants are considered; anything else: the problem's function is the only one
    params, x1, x2 : of the problem; arrays may be shapes
    output, outputs : as in `ntk`
    memory : bytes beside the parameters and the examples; the kernel counts, or that of two blocks
    by_layer : whether there is a kernel for each layer, which cannot be computed in blocks

    Raises
    ------
    InputError
        If nothing fits, or the device does not say how much memory a program takes.
    """
    choices = list(variants(model if is_model(model) else problem.function, params, output))
    every = problem.rows, problem.columns
    crossed = is_crossed(problem, outputs)
    count = problem.rows * (problem.columns or problem.rows) * (problem.outputs**2 if crossed else problem.outputs)
    whole = 0
    for variant in choices if 4 * count <= memory else ():  # else the result alone is too much
        takes = needed_bytes(trace_program(problem, variant, x1, x2, crossed, every))
        if takes <= memory:
            return Choice(variant, None, f"{variant.what or 'as it is'}, {format_mib(takes)}")
        whole = takes
    if by_layer:
        raise InputError(
            f"memory={memory} bytes is too little for all examples at once, and blocks of them give the sum over "
            "layers only; allow more, or choose layers one after the other with `parameters`."
        )
    why = f"all examples at once take {format_mib(whole or 4 * count)}"
    found: tuple[float, Choice] | None = None
    refused: list[tuple[int, int]] = []
    for variant in choices:
        blocks = Blocks(problem, variant, x1, x2, outputs)
        if found is not None and blocks.cost(blocks.most) >= found[0]:
            continue  # not even with its largest block
        block, takes = blocks.largest(memory)
        if not block:
            refused.append((takes, blocks.least))
        elif found is None or blocks.cost(block) < found[0]:
            how = f"in blocks of {block} examples, {variant.what or 'as it is'}, {format_mib(takes)}; {why}"
            found = blocks.cost(block), Choice(variant, block, how)
    if found is None:
        raise memory_error(memory, *min(refused))
    return found[1]


class Blocks:
    """A kernel computed by one variant in pairs of blocks of examples.

    Parameters
    ----------
    problem, variant, x1, x2, outputs : as in `plan_memory`
    even : whether a block is made smaller where that needs no more blocks, so that the last one is padded less

    Attributes
    ----------
    least, most : examples on each side of the smallest block that is tried, and of the largest
    """

    def __init__(
        self, problem: KernelProblem, variant: Variant, x1: Any, x2: Any, outputs: str, *, even: bool = True
    ) -> None:
        self._given, self._even = (problem, variant, x1, x2, is_crossed(problem, outputs)), even
        self._sides = problem.rows, problem.columns or problem.rows
        longest = max(self._sides)
        # With `even` there are at least two blocks: all examples at once were tried before.
        self.most = self._evened(max(1, min(LARGEST_BLOCK, longest - 1 if even else longest)))
        self.least = min(2, self.most)

    def largest(self, memory: int) -> tuple[int, int]:
        """Return the largest block that fits and the bytes it takes; 0 and those of the smallest if none fits.

        Larger blocks are expected to take more. Programs of blocks are compiled and their memory read, the next one
        where the line through the last two meets the limit, until the next larger block does not fit or, from 16
        examples on, the largest block that may fit is larger by a sixteenth at most.
        """
        sizes = sorted({self._evened(block) for block in range(self.least, self.most + 1)})
        known = [(self.least, self.program_bytes(self.least))]
        if known[0][1] > memory:
            return 0, known[0][1]
        guess, fits, too_large = 8, 0, len(sizes)  # the latter two are indices of `sizes`
        while sizes[too_large - 1] - sizes[fits] > sizes[fits] // 16:
            place = min(max(bisect.bisect_right(sizes, guess) - 1, fits + 1), too_large - 1)
            known.append((sizes[place], self.program_bytes(sizes[place])))
            if known[-1][1] <= memory:
                fits = place
            else:
                too_large = place
            (first, of_first), (last, of_last) = sorted(known[-2:])
            if len(known) < 5 and of_last > of_first:
                guess = int(min(self.most, first + (memory - of_first) / (of_last - of_first) * (last - first)))
            else:
                guess = sizes[(fits + too_large) // 2]
        return sizes[fits], dict(known)[sizes[fits]]

    def cost(self, block: int) -> float:
        """Return the number of operations of all pairs of blocks, see `plan_memory`."""
        rows, columns = (-(-n // block) for n in self._sides)
        pairs = rows * columns / (2 if self._given[0].columns is None else 1)
        return operations(self._traced(block).jaxpr) * pairs

    def _evened(self, block: int) -> int:
        return max(-(-n // -(-n // block)) for n in self._sides) if self._even else block

    def _traced(self, block: int) -> Any:
        rows, columns = (min(block, n) for n in self._sides)
        return trace_program(*self._given, (rows, columns))

    def program_bytes(self, block: int) -> int:
        """Return the bytes that the program of a pair of blocks takes."""
        return needed_bytes(self._traced(block))


def trace_program(
    problem: KernelProblem, variant: Variant, x1: Any, x2: Any, crossed: bool, sizes: tuple[int, int | None]
) -> Any:
    """Return the traced program for `sizes` (rows, columns) examples; columns None: the rows again."""

    def of_size(x: Any, size: int) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), abstract(x))

    rows, columns = sizes
    own = dataclasses.replace(problem, function=variant.function, rows=rows, columns=columns)
    right = None if columns is None else of_size(x1 if x2 is None else x2, columns)
    return transformed_program(own, GramReduction(rows, columns, crossed)).trace(
        variant.params, of_size(x1, rows), right, None
    )


def needed_bytes(traced: Any) -> int:
    """Return the bytes that a traced program takes beside its arguments, by XLA's analysis of the compiled program.

    Raises
    ------
    InputError
        If there is no such analysis for the device.
    """
    analysis = traced.lower().compile().memory_analysis()
    if analysis is None:
        raise InputError("This device does not say how much memory a program takes; give `block` instead of `memory`.")
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)


def operations(jaxpr: Any) -> float:
    """Count the operations of a jaxpr: two for each term of a product, one for each number of any other output.

    XLA's own count takes a loop's body once, and so does not include what is recomputed in it. Here only the body of a
    `while`, whose length is not known, is taken once; of a `cond` it is the longest branch.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = [operations(program) for program in ir.called(eqn)]
        if eqn.primitive is jp.cond_p:
            total += max(inner)
            continue
        count = sum(math.prod(v.aval.shape) for v in eqn.outvars)
        if eqn.primitive is jp.dot_general_p:
            (over, _), _ = eqn.params["dimension_numbers"]
            count *= 2 * math.prod(eqn.invars[0].aval.shape[axis] for axis in over)
        elif eqn.primitive is jp.conv_general_dilated_p:
            kernel = eqn.invars[1].aval.shape
            count *= 2 * math.prod(kernel) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        # The function that a scatter or a reduction calls is for one of the numbers that it computes.
        total += max(count, sum(inner) * (eqn.params["length"] if eqn.primitive is jp.scan_p else 1))
    return total


def memory_error(memory: int, takes: int, size: int) -> InputError:
    """Return the error to raise where not even a block of `size` examples fits."""
    return InputError(
        f"memory={memory} bytes is too little: a block of {size} examples takes {takes}; "
        "allow more, or choose fewer parameters with `parameters`."
    )


def format_mib(count: float) -> str:
    """Return a number of bytes in MiB, in digits."""
    mib = count / 2**20
    return f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.3g} MiB"
