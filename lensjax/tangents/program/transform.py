"""Run a planned program for all examples so that one backward pass returns a reduction of the per-example gradients.

Every use of a parameter and every materialized value is a custom-VJP function with an extra argument of zeros, its
*accumulator*. The forward pass ignores it; in the backward pass its cotangent is the parameter's contribution to the
kernel. Cotangents of one accumulator add up, so the gradient with respect to the accumulators is the kernel. Parameters
used more than once have *taps* instead: the cotangent of a tap is that of the operation's output, and the factors are
joined at the end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lensjax_kernels.gram import EXACT

from lensjax.tangents.program import contributions, ir, shared_parameters
from lensjax.tangents.program.operations import FactorLayout, ParameterUse, other_operands
from lensjax.tangents.program.plan import GradientSite, Plan
from lensjax.tangents.program.reductions import Reduction, TensorSketch

Tap = tuple[int, int]
"""(index of the site, position among the uses there)."""


@dataclasses.dataclass
class _Frame:
    """What a part of the program reads and saves besides its values."""

    accumulators: dict[int, jax.Array]
    taps: dict[Tap, jax.Array]
    iterations: dict[int, jax.Array]
    saved: dict[Tap, tuple[jax.Array, ...]]


class Transform:
    """The transformed program.

    Parameters
    ----------
    plan : Plan
    reduction : Reduction
        Of the per-example gradients.
    outputs : how many numbers the function returns for one example
    """

    def __init__(self, plan: Plan, reduction: Reduction, outputs: int) -> None:
        self.plan, self.reduction, self.outputs = plan, reduction, outputs
        self.loop_numbers: dict[ir.Operation, int] = {}
        self.accumulator_numbers: dict[Any, int] = {}
        self.direct = {s.index: self._direct(s) for s in plan.sites if s.how == "shared"}
        self.shared_sites = [] if isinstance(reduction, TensorSketch) else [s for s in plan.sites if s.how == "shared"]
        self.loops_of: dict[Tap, tuple[ir.Operation, ...]] = {
            (s.index, i): (*s.node.loops, *s.loops_of_uses[i]) for s in self.shared_sites for i in range(len(s.uses))
        }

    def __call__(self, params: Sequence[jax.Array], examples: Sequence[jax.Array], key: Any) -> dict[int, jax.Array]:
        """Return the reduction for each layer, shaped `reduction.shape(outputs)`.

        Parameters
        ----------
        params : leaves of the parameters
        examples : leaves of the examples, (B, ...)
        key : PRNG key for a `TensorSketch`, else None
        """
        self.key = key
        dtype = jnp.result_type(jnp.float32, *(p.dtype for p in params if jnp.issubdtype(p.dtype, jnp.floating)))
        accumulators = self._accumulators(dtype)
        taps = self._taps()

        def total(
            accumulators: dict[int, jax.Array], taps: dict[Tap, jax.Array]
        ) -> tuple[jax.Array, dict[Tap, tuple[jax.Array, ...]]]:
            frame = _Frame(accumulators, taps, {}, {})
            outs = self._block(self.plan.block, [*params, *examples], frame)
            wide = [self._widen(o, a) for o, a in zip(outs, self.plan.block.outputs, strict=True)]
            flat = [w.reshape(self.reduction.examples, -1) for w in wide]
            return jnp.concatenate(flat, axis=1), frame.saved

        y, vjp, saved = jax.vjp(total, accumulators, taps, has_aux=True)
        if self.outputs == 1:
            shared, collected = jax.tree.map(lambda c: c[None], vjp(jnp.ones_like(y)))
        else:
            seeds = jnp.broadcast_to(jnp.eye(self.outputs, dtype=y.dtype)[:, None], (self.outputs, *y.shape))
            shared, collected = jax.vmap(vjp)(seeds)
        return self._collect(shared, collected, saved)

    # Inputs of the differentiated function

    def _accumulator_index(self, site: GradientSite) -> int:
        """Return the number of the site's accumulator; sites of the same layers and gains have one in common."""
        loop = self.plan.loop_of(site)
        what = site.node.layer_weights[0] if loop is None else site
        return self.accumulator_numbers.setdefault(what, len(self.accumulator_numbers))

    def _has_accumulator(self, site: GradientSite, position: int = 0) -> bool:
        if site.how != "shared" or isinstance(self.reduction, TensorSketch):
            return True
        return self.direct[site.index] and site.uses[position].kind == "head"

    def _accumulators(self, dtype: Any) -> dict[int, jax.Array]:
        one = self.reduction.shape(self.outputs)
        shape = (one[0], *one[2:]) if self.reduction.crossed else one[1:]
        accumulators = {}
        for site in self.plan.sites:
            if any(self._has_accumulator(site, i) for i in range(max(1, len(site.uses)))):
                loop = self.plan.loop_of(site)
                around = () if loop is None else (loop.params["length"],)
                accumulators[self._accumulator_index(site)] = jnp.zeros(around + shape, dtype)
        return accumulators

    def _taps(self) -> dict[Tap, jax.Array]:
        taps = {}
        for (index, position), loops in self.loops_of.items():
            out = self.plan.sites[index].uses[position].operation.outputs[0].aval
            around = tuple(loop.params["length"] for loop in loops)
            taps[index, position] = jnp.zeros((*around, self.reduction.examples, *out.shape), out.dtype)
        return taps

    def _direct(self, site: GradientSite) -> bool:
        tokens = []
        for use, loops in zip(site.uses, site.loops_of_uses, strict=True):
            tokens.append(use.tokens() * math.prod(loop.params["length"] for loop in loops))
        looped = bool(site.node.loops) or any(site.loops_of_uses)
        return shared_parameters.use_token_pairs(site.uses, looped, tokens, self.outputs, self.reduction)

    # Running the program

    def _widen(self, value: jax.Array, atom: ir.Atom) -> jax.Array:
        """Return the value with an axis of examples."""
        if isinstance(atom, ir.Value) and atom in self.plan.batched:
            return value
        return jnp.broadcast_to(jnp.asarray(value), (self.reduction.examples, *jnp.shape(value)))

    def _block(self, block: ir.Block, args: Sequence[Any], frame: _Frame) -> list[Any]:
        values: dict[ir.Value, Any] = {}

        def define(value: ir.Value, x: Any) -> None:
            site = self.plan.materialized.get(value)
            values[value] = x if site is None else self._materialize(site, x, frame)

        def read(atom: ir.Atom) -> Any:
            return atom.value if isinstance(atom, ir.Known) else values[atom]

        for value, x in zip(block.inputs, args, strict=True):
            define(value, x)
        for operation in block.operations:
            operands = [read(a) for a in operation.inputs]
            if operation in self.plan.use_sites:
                outs = [self._apply_use(operation, operands, frame)]
            elif operation.kind == "remat":
                outs = self._remat(operation, operands, frame)
            elif operation.kind == "scan":
                outs = self._scan(operation, operands, frame)
            else:
                outs = self._primitive(operation, operands)
            for value, x in zip(operation.outputs, outs, strict=True):
                define(value, x)
        return [read(a) for a in block.outputs]

    def _is_batched(self, atom: ir.Atom) -> bool:
        return isinstance(atom, ir.Value) and atom in self.plan.batched

    def _primitive(self, operation: ir.Operation, operands: list[Any]) -> list[Any]:
        axes = [0 if self._is_batched(a) else None for a in operation.inputs]
        if all(a is None for a in axes):
            outs = operation.bind(*operands)
            return [self._widen_unless(o, v) for o, v in zip(outs, operation.outputs, strict=True)]
        return list(jax.vmap(operation.bind, in_axes=axes)(*operands))

    def _widen_unless(self, x: Any, value: ir.Value) -> Any:
        # It counts as depending on the examples although its operands are the same for all of them.
        if value not in self.plan.batched or value in self.plan.materialized:
            return x
        return jnp.broadcast_to(x, (self.reduction.examples, *x.shape))

    def _remat(self, operation: ir.Operation, operands: list[Any], frame: _Frame) -> list[Any]:
        body = operation.body
        assert body is not None

        def run(operands: list[Any], accumulators: Any, taps: Any, iterations: Any) -> Any:
            inner = _Frame(accumulators, taps, iterations, {})
            return self._block(body, operands, inner), inner.saved

        run = jax.checkpoint(run, policy=operation.params["policy"], prevent_cse=ir.prevents_cse(operation))
        outs, saved = run(operands, frame.accumulators, frame.taps, frame.iterations)
        frame.saved.update(saved)
        return [
            self._widen(o, a) if v in self.plan.batched else o
            for o, a, v in zip(outs, body.outputs, operation.outputs, strict=True)
        ]

    def _scan(self, operation: ir.Operation, operands: list[Any], frame: _Frame) -> list[Any]:
        body, params = operation.body, operation.params
        assert body is not None
        first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
        consts = operands[:first]
        carry = [
            self._widen(x, a) if v in self.plan.batched else x
            for x, a, v in zip(operands[first:last], operation.inputs[first:last], body.inputs[first:last], strict=True)
        ]
        xs = [
            jnp.moveaxis(x, 1, 0) if self._is_batched(a) else x
            for x, a in zip(operands[last:], operation.inputs[last:], strict=True)
        ]
        by_iteration = {
            self._accumulator_index(s): frame.accumulators[self._accumulator_index(s)]
            for s in self.plan.sites
            if self.plan.loop_of(s) is operation and self._accumulator_index(s) in frame.accumulators
        }
        inside = {tap: frame.taps[tap] for tap, loops in self.loops_of.items() if operation in loops}
        number = self.loop_numbers.setdefault(operation, len(self.loop_numbers))

        def step(carry: list[Any], each: Any) -> Any:
            own, accumulators, taps, iteration = each
            inner = _Frame(
                {**frame.accumulators, **accumulators},
                {**frame.taps, **taps},
                {**frame.iterations, number: iteration},
                {},
            )
            outs = self._block(body, [*consts, *carry, *own], inner)
            after = [
                self._widen(o, a) if v in self.plan.batched else o
                for o, a, v in zip(outs, body.outputs, body.inputs[first:last], strict=False)
            ]
            return after, ([
                self._widen(o, a) if v in self.plan.batched else o
                for o, a, v in zip(
                    outs[len(carry) :], body.outputs[len(carry) :], operation.outputs[len(carry) :], strict=True
                )
            ], inner.saved)  # fmt: skip

        each = (xs, by_iteration, inside, jnp.arange(params["length"]))
        after, (ys, saved) = jax.lax.scan(
            step, carry, each, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
        )
        frame.saved.update(saved)
        return [
            *after,
            *(
                jnp.moveaxis(y, 0, 1) if v in self.plan.batched else y
                for y, v in zip(ys, operation.outputs[len(after) :], strict=True)
            ),
        ]

    # Operations with a contribution

    def _key_of(self, site: GradientSite, frame: _Frame) -> jax.Array | None:
        if self.key is None:
            return None
        key = jax.random.fold_in(self.key, site.index)
        for loop in site.node.loops:
            key = jax.random.fold_in(key, frame.iterations[self.loop_numbers[loop]])
        return jax.random.key_data(key)

    def _over_outputs(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Turn a function of cotangents (B, C, ...) and other arrays into one of cotangents (B, ...).

        The function returns (cotangents (B, C, ...) of an input or None, contribution shaped `reduction.shape(C)`).
        For the kernel of all pairs of outputs it gets all outputs together once the backward pass is mapped over them,
        by a mapping rule of its own.
        """
        if not self.reduction.crossed:

            def single(ct: jax.Array, *arrays: Any) -> Any:
                input_cotangent, contribution = function(ct[:, None], *arrays)
                return None if input_cotangent is None else input_cotangent[:, 0], contribution[0]

            return single

        @jax.custom_batching.custom_vmap
        def crossed(ct: jax.Array, *arrays: Any) -> Any:
            same = jnp.broadcast_to(ct[:, None], (ct.shape[0], self.outputs, *ct.shape[1:]))
            input_cotangent, contribution = function(same, *arrays)
            return None if input_cotangent is None else input_cotangent[:, 0], contribution[:, 0]

        @crossed.def_vmap
        def rule(size: int, mapped: Any, ct: jax.Array, *arrays: Any) -> Any:
            if not mapped[0]:
                ct = jnp.broadcast_to(ct, (size, *ct.shape))
            # The rest is from the forward pass, which is not mapped over outputs.
            arrays = jax.tree.map(lambda x, m: x[0] if m else x, arrays, tuple(mapped[1:]))
            input_cotangent, contribution = function(jnp.moveaxis(ct, 0, 1), *arrays)
            out = (
                None if input_cotangent is None else jnp.moveaxis(input_cotangent, 1, 0),
                jnp.moveaxis(contribution, 1, 0),
            )
            return out, jax.tree.map(lambda _: True, out)

        return crossed

    def _materialize(self, site: GradientSite, w: jax.Array, frame: _Frame) -> jax.Array:
        reduction = self.reduction
        contribution = self._over_outputs(
            lambda ct, key: (None, contributions.materialized_contribution(ct, reduction, _wrap(key)))
        )

        def copies(w: jax.Array) -> jax.Array:
            return jnp.broadcast_to(w, (reduction.examples, *w.shape))

        @jax.custom_vjp
        def materialize(accumulator: jax.Array, w: jax.Array, key: Any) -> jax.Array:
            return copies(w)

        def forward(accumulator: jax.Array, w: jax.Array, key: Any) -> Any:
            # Not by `materialize`, whose rule has no gradient for w, which derivatives of the kernel itself need.
            return copies(w), (accumulator, key)

        def backward(residual: Any, ct: jax.Array) -> Any:
            accumulator, key = residual
            return contribution(ct, key)[1].astype(accumulator.dtype), None, None

        materialize.defvjp(forward, backward)
        return materialize(frame.accumulators[self._accumulator_index(site)], w, self._key_of(site, frame))

    def _apply_use(self, operation: ir.Operation, operands: list[Any], frame: _Frame) -> jax.Array:
        position, site = self.plan.use_sites[operation]
        use, layout = site.uses[position], site.layouts[position]
        atoms = other_operands(use, list(operation.inputs))
        rest = tuple(self._widen(x, a) for x, a in zip(other_operands(use, operands), atoms, strict=True))
        shared_ids = use.kind == "rows" and not self._is_batched(atoms[0])
        accumulator = (
            frame.accumulators[self._accumulator_index(site)] if self._has_accumulator(site, position) else None
        )
        tap = frame.taps.get((site.index, position))
        call = self._use_call(use, layout, shared_ids)
        out, saved = call(accumulator, tap, self._key_of(site, frame), operands[use.which], rest)
        if tap is not None:
            # The weight itself is needed where the head's left factor is computed again.
            frame.saved[site.index, position] = (*saved, operands[use.which]) if use.kind == "head" else saved
        return out

    def _use_call(self, use: ParameterUse, layout: FactorLayout, shared_ids: bool) -> Callable[..., Any]:
        reduction = self.reduction

        def contribute(ct: jax.Array, key: Any, w: jax.Array, saved: tuple[jax.Array, ...]) -> Any:
            key = _wrap(key)
            if use.kind == "head":
                return contributions.head_contribution(saved, w, ct, reduction, key)
            if use.kind == "rows":
                right = jax.vmap(layout.cotangents, 1, 1)(ct)
                ids = layout.ids(saved[0])
                return None, contributions.lookup_contribution(ids, right, use.shape[0], shared_ids, reduction, key)
            if use.kind == "conv":
                return None, contributions.convolution_contribution(layout, saved[0], ct, reduction, key)
            return None, contributions.dot_contribution(layout, saved[0], ct, reduction, key)

        contribute_all = self._over_outputs(contribute)

        @jax.custom_vjp
        def call(accumulator: Any, tap: Any, key: Any, w: jax.Array, rest: tuple[jax.Array, ...]) -> Any:
            return use.forward(w, rest)

        def forward(accumulator: Any, tap: Any, key: Any, w: jax.Array, rest: tuple[jax.Array, ...]) -> Any:
            out, saved = use.forward(w, rest)
            return (out, saved), (accumulator, tap, key, w, rest, saved)

        def backward(residual: Any, cts: Any) -> Any:
            accumulator, tap, key, w, rest, saved = residual
            ct, input_cotangent, contribution = cts[0], None, None
            if accumulator is not None:
                input_cotangent, contribution = contribute_all(ct, key, w, saved)
                contribution = contribution.astype(accumulator.dtype)
            elif use.kind == "head":
                input_cotangent = contributions.head_contribution(saved, w, ct[:, None], None, None)[0][:, 0]
            if use.kind in ("dot", "conv"):
                (input_cotangent,) = jax.vjp(lambda x: use.apply(w, x), rest[0])[1](ct)
            into_rest = {"rows": (None,), "head": (input_cotangent, None)}.get(use.kind, (input_cotangent,))
            return contribution, None if tap is None else ct, None, None, into_rest

        call.defvjp(forward, backward)
        return call

    # Results

    def _collect(
        self,
        shared: dict[int, jax.Array],
        collected: dict[Tap, jax.Array],
        saved: dict[Tap, tuple[jax.Array, ...]],
    ) -> dict[int, jax.Array]:
        results: dict[int, jax.Array] = {}

        def add(site: GradientSite, contribution: jax.Array) -> None:
            """Add a contribution to its layers: (iterations, ...) if these differ by iteration, else (...)."""
            loop = self.plan.loop_of(site)
            gains: dict[int, Any] = {}  # of each layer, in each iteration
            for layer, gain in site.node.layer_weights[0]:
                if layer >= 0:
                    gains[layer] = gains.get(layer, 0.0) + gain
                    continue
                for i, iteration in enumerate(self.plan.per_iteration_layers[-layer - 1][1]):
                    for own, times in iteration:
                        # An array, also where the gain so far is one number for all iterations; and a copy.
                        gains[own] = gains.get(own, 0.0) + np.zeros(len(contribution))
                        gains[own][i] += gain * times
            for layer, gain in gains.items():
                # A sketch is linear in the gradient, the other reductions are quadratic.
                factor = np.sqrt(gain) if isinstance(self.reduction, TensorSketch) else np.asarray(gain)
                if loop is not None:
                    factor = np.broadcast_to(factor, len(contribution)).astype(contribution.dtype)
                    places = np.flatnonzero(factor)
                    part = jnp.tensordot(factor[places], contribution[places], axes=1, precision=EXACT)
                else:
                    part = contribution if factor == 1.0 else contribution * float(factor)
                results[layer] = results[layer] + part if layer in results else part

        done = set()
        for site in self.plan.sites:
            key = self._accumulator_index(site)
            if key not in shared or key in done:
                continue
            done.add(key)
            contribution = shared[key]  # (C, [iterations], ...)
            if self.plan.loop_of(site) is not None:
                contribution = jnp.moveaxis(contribution, 1, 0)
                contribution = jnp.moveaxis(contribution, 1, 2) if self.reduction.crossed else contribution
            elif self.reduction.crossed:
                contribution = jnp.moveaxis(contribution, 0, 1)
            add(site, contribution)
        for site in self.shared_sites:
            add(site, self._shared_contribution(site, collected, saved))
        return results

    def _shared_contribution(
        self,
        site: GradientSite,
        collected: dict[Tap, jax.Array],
        saved: dict[Tap, tuple[jax.Array, ...]],
    ) -> jax.Array:
        """Return the contribution of a parameter with several uses: (iterations, ...) if layers differ by iteration."""
        sliced = [loop.params["length"] for loop in site.node.loops]
        times = math.prod(sliced)
        residuals, cotangents, weight = [], [], None
        for i, use in enumerate(site.uses):
            residual, ct = list(saved[site.index, i]), collected[site.index, i]
            repeats = math.prod(loop.params["length"] for loop in site.loops_of_uses[i])
            around = len(self.loops_of[site.index, i])
            if use.kind == "head":
                weight = residual.pop()
                weight = weight.reshape(times, repeats, *weight.shape[around:])[:, 0]
            # (C, times, repeats, B, ...) -> (times, B, C, repeats, ...)
            ct = ct.reshape(self.outputs, times, repeats, *ct.shape[1 + around :])
            cotangents.append(jnp.transpose(ct, (1, 3, 0, 2, *range(4, ct.ndim))))
            shaped = [None if x is None else x.reshape(times, repeats, *x.shape[around:]) for x in residual]
            residuals.append(tuple(None if x is None else jnp.moveaxis(x, 2, 1) for x in shaped))

        def one(each: Any) -> jax.Array:
            residuals, cotangents, weight = each
            direct = self.direct[site.index]
            return shared_parameters.shared_contribution(
                site.layouts, residuals, cotangents, weight, self.reduction, direct
            )

        each = (residuals, cotangents, weight)
        if not sliced:
            return one(jax.tree.map(lambda x: x[0], each))
        contribution = jax.lax.map(one, each)
        loop = self.plan.loop_of(site)
        if loop is None:
            return contribution.sum(0)
        contribution = contribution.reshape(*sliced, *contribution.shape[1:])
        axis = site.node.loops.index(loop)
        return contribution.sum(tuple(i for i in range(len(sliced)) if i != axis))


def _wrap(key: Any) -> Any:
    return None if key is None else jax.random.wrap_key_data(key)
