"""Run a planned program for all examples so that one backward pass hands back what is wanted of the gradients.

Every tapped operation and every lift is a custom-VJP function with an extra argument of zeros, its *slot*. The slot
does nothing on the way forward; on the way back its cotangent is the share of the kernel that the parameter has there.
Cotangents of one slot add up, so the gradient with respect to the slots is the kernel. Parameters used more than once
have *taps* instead: the cotangent of a tap is that of the operation's output, and the factors are joined at the end.
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
from lensjax.tangents.program.operations import Canonical, Use, rest_of
from lensjax.tangents.program.plan import Plan, Site
from lensjax.tangents.program.reductions import Features, Reducer

Tap = tuple[int, int]
"""(index of the site, position among its uses)."""


@dataclasses.dataclass
class _Frame:
    """What a piece of the program reads and leaves besides its values."""

    slots: dict[int, jax.Array]
    taps: dict[Tap, jax.Array]
    iterations: dict[int, jax.Array]
    saved: dict[Tap, tuple[jax.Array, ...]]


class Transform:
    """The transformed program.

    Parameters
    ----------
    plan : Plan
    reducer : what is wanted of the per-example gradients
    outputs : how many numbers the function gives for one example
    """

    def __init__(self, plan: Plan, reducer: Reducer, outputs: int) -> None:
        self.plan, self.reducer, self.outputs = plan, reducer, outputs
        self.loop_numbers: dict[ir.Operation, int] = {}
        self.slot_numbers: dict[Any, int] = {}
        self.direct = {s.index: self._direct(s) for s in plan.sites if s.how == "group"}
        self.tapped_sites = [] if isinstance(reducer, Features) else [s for s in plan.sites if s.how == "group"]
        self.loops_of: dict[Tap, tuple[ir.Operation, ...]] = {
            (s.index, i): (*s.node.loops, *s.loops_of_uses[i]) for s in self.tapped_sites for i in range(len(s.uses))
        }

    def __call__(self, params: Sequence[jax.Array], examples: Sequence[jax.Array], key: Any) -> dict[int, jax.Array]:
        """Return what the reducer wants for each layer, shaped `reducer.shape(outputs)`.

        Parameters
        ----------
        params : leaves of the parameters
        examples : leaves of the examples, (B, ...)
        key : PRNG key for features, else None
        """
        self.key = key
        dtype = jnp.result_type(jnp.float32, *(p.dtype for p in params if jnp.issubdtype(p.dtype, jnp.floating)))
        slots = self._slots(dtype)
        taps = self._taps()

        def total(
            slots: dict[int, jax.Array], taps: dict[Tap, jax.Array]
        ) -> tuple[jax.Array, dict[Tap, tuple[jax.Array, ...]]]:
            frame = _Frame(slots, taps, {}, {})
            outs = self._block(self.plan.block, [*params, *examples], frame)
            wide = [self._widen(o, a) for o, a in zip(outs, self.plan.block.outputs, strict=True)]
            flat = [w.reshape(self.reducer.examples, -1) for w in wide]
            return jnp.concatenate(flat, axis=1), frame.saved

        y, pull, saved = jax.vjp(total, slots, taps, has_aux=True)
        if self.outputs == 1:
            shared, collected = jax.tree.map(lambda c: c[None], pull(jnp.ones_like(y)))
        else:
            seeds = jnp.broadcast_to(jnp.eye(self.outputs, dtype=y.dtype)[:, None], (self.outputs, *y.shape))
            shared, collected = jax.vmap(pull)(seeds)
        return self._collect(shared, collected, saved)

    # What goes in

    def _slot_key(self, site: Site) -> int:
        """Return the number of the site's slot; sites of the same layers with the same gain share one."""
        loop = self.plan.loop_of(site)
        what = site.node.owners[0] if loop is None else site
        return self.slot_numbers.setdefault(what, len(self.slot_numbers))

    def _has_slot(self, site: Site, position: int = 0) -> bool:
        if site.how != "group" or isinstance(self.reducer, Features):
            return True
        return self.direct[site.index] and site.uses[position].kind == "head"

    def _slots(self, dtype: Any) -> dict[int, jax.Array]:
        one = self.reducer.shape(self.outputs)
        shape = (one[0], *one[2:]) if self.reducer.crossed else one[1:]
        slots = {}
        for site in self.plan.sites:
            if any(self._has_slot(site, i) for i in range(max(1, len(site.uses)))):
                loop = self.plan.loop_of(site)
                around = () if loop is None else (loop.params["length"],)
                slots[self._slot_key(site)] = jnp.zeros(around + shape, dtype)
        return slots

    def _taps(self) -> dict[Tap, jax.Array]:
        taps = {}
        for (index, position), loops in self.loops_of.items():
            out = self.plan.sites[index].uses[position].operation.outputs[0].aval
            around = tuple(loop.params["length"] for loop in loops)
            taps[index, position] = jnp.zeros((*around, self.reducer.examples, *out.shape), out.dtype)
        return taps

    def _direct(self, site: Site) -> bool:
        tokens = []
        for use, loops in zip(site.uses, site.loops_of_uses, strict=True):
            tokens.append(use.tokens() * math.prod(loop.params["length"] for loop in loops))
        looped = bool(site.node.loops) or any(site.loops_of_uses)
        return shared_parameters.by_tokens(site.uses, looped, tokens, self.outputs, self.reducer)

    # Running the program

    def _widen(self, value: jax.Array, atom: ir.Atom) -> jax.Array:
        """Give every example its own value."""
        if isinstance(atom, ir.Value) and atom in self.plan.batched:
            return value
        return jnp.broadcast_to(jnp.asarray(value), (self.reducer.examples, *jnp.shape(value)))

    def _block(self, block: ir.Block, args: Sequence[Any], frame: _Frame) -> list[Any]:
        values: dict[ir.Value, Any] = {}

        def define(value: ir.Value, x: Any) -> None:
            site = self.plan.lifted.get(value)
            values[value] = x if site is None else self._lift(site, x, frame)

        def read(atom: ir.Atom) -> Any:
            return atom.value if isinstance(atom, ir.Known) else values[atom]

        for value, x in zip(block.inputs, args, strict=True):
            define(value, x)
        for operation in block.operations:
            operands = [read(a) for a in operation.inputs]
            if operation in self.plan.tapped:
                outs = [self._tap(operation, operands, frame)]
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
        # Marked as depending on the examples although its operands are the same for all of them.
        if value not in self.plan.batched or value in self.plan.lifted:
            return x
        return jnp.broadcast_to(x, (self.reducer.examples, *x.shape))

    def _remat(self, operation: ir.Operation, operands: list[Any], frame: _Frame) -> list[Any]:
        body = operation.body
        assert body is not None

        def run(operands: list[Any], slots: Any, taps: Any, iterations: Any) -> Any:
            inner = _Frame(slots, taps, iterations, {})
            return self._block(body, operands, inner), inner.saved

        run = jax.checkpoint(run, policy=operation.params["policy"], prevent_cse=ir.prevents_cse(operation))
        outs, saved = run(operands, frame.slots, frame.taps, frame.iterations)
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
            self._slot_key(s): frame.slots[self._slot_key(s)]
            for s in self.plan.sites
            if self.plan.loop_of(s) is operation and self._slot_key(s) in frame.slots
        }
        inside = {tap: frame.taps[tap] for tap, loops in self.loops_of.items() if operation in loops}
        number = self.loop_numbers.setdefault(operation, len(self.loop_numbers))

        def step(carry: list[Any], each: Any) -> Any:
            own, slots, taps, iteration = each
            inner = _Frame(
                {**frame.slots, **slots}, {**frame.taps, **taps}, {**frame.iterations, number: iteration}, {}
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

    # Operations with a share

    def _key_of(self, site: Site, frame: _Frame) -> jax.Array | None:
        if self.key is None:
            return None
        key = jax.random.fold_in(self.key, site.index)
        for loop in site.node.loops:
            key = jax.random.fold_in(key, frame.iterations[self.loop_numbers[loop]])
        return jax.random.key_data(key)

    def _over_outputs(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function of cotangents (B, C, ...) and other arrays one of cotangents (B, ...).

        It returns (pulled (B, C, ...) or None, share shaped `reducer.shape(C)`). Where all pairs of outputs are
        wanted, the call sees all outputs together once the pull-back is mapped over them: a mapping rule of its own.
        """
        if not self.reducer.crossed:

            def single(ct: jax.Array, *arrays: Any) -> Any:
                pulled, share = function(ct[:, None], *arrays)
                return None if pulled is None else pulled[:, 0], share[0]

            return single

        @jax.custom_batching.custom_vmap
        def crossed(ct: jax.Array, *arrays: Any) -> Any:
            same = jnp.broadcast_to(ct[:, None], (ct.shape[0], self.outputs, *ct.shape[1:]))
            pulled, share = function(same, *arrays)
            return None if pulled is None else pulled[:, 0], share[:, 0]

        @crossed.def_vmap
        def rule(size: int, mapped: Any, ct: jax.Array, *arrays: Any) -> Any:
            if not mapped[0]:
                ct = jnp.broadcast_to(ct, (size, *ct.shape))
            # The rest comes from the forward pass, which knows nothing of the mapping over outputs.
            arrays = jax.tree.map(lambda x, m: x[0] if m else x, arrays, tuple(mapped[1:]))
            pulled, share = function(jnp.moveaxis(ct, 0, 1), *arrays)
            out = (None if pulled is None else jnp.moveaxis(pulled, 1, 0), jnp.moveaxis(share, 1, 0))
            return out, jax.tree.map(lambda _: True, out)

        return crossed

    def _lift(self, site: Site, w: jax.Array, frame: _Frame) -> jax.Array:
        reducer = self.reducer
        share = self._over_outputs(lambda ct, key: (None, contributions.of_lift(ct, reducer, _wrap(key))))

        def copies(w: jax.Array) -> jax.Array:
            return jnp.broadcast_to(w, (reducer.examples, *w.shape))

        @jax.custom_vjp
        def lift(slot: jax.Array, w: jax.Array, key: Any) -> jax.Array:
            return copies(w)

        def forward(slot: jax.Array, w: jax.Array, key: Any) -> Any:
            # Not by `lift`, whose rule has no gradient for w: the kernel itself is differentiated through here.
            return copies(w), (slot, key)

        def backward(residual: Any, ct: jax.Array) -> Any:
            slot, key = residual
            return share(ct, key)[1].astype(slot.dtype), None, None

        lift.defvjp(forward, backward)
        return lift(frame.slots[self._slot_key(site)], w, self._key_of(site, frame))

    def _tap(self, operation: ir.Operation, operands: list[Any], frame: _Frame) -> jax.Array:
        position, site = self.plan.tapped[operation]
        use, canonical = site.uses[position], site.canonicals[position]
        atoms = rest_of(use, list(operation.inputs))
        rest = tuple(self._widen(x, a) for x, a in zip(rest_of(use, operands), atoms, strict=True))
        shared_ids = use.kind == "rows" and not self._is_batched(atoms[0])
        slot = frame.slots[self._slot_key(site)] if self._has_slot(site, position) else None
        tap = frame.taps.get((site.index, position))
        call = self._tapped_call(use, canonical, shared_ids)
        out, saved = call(slot, tap, self._key_of(site, frame), operands[use.which], rest)
        if tap is not None:
            # The weight itself is needed where the head's left factor is made again.
            frame.saved[site.index, position] = (*saved, operands[use.which]) if use.kind == "head" else saved
        return out

    def _tapped_call(self, use: Use, canonical: Canonical, shared_ids: bool) -> Callable[..., Any]:
        reducer = self.reducer

        def pull(ct: jax.Array, key: Any, w: jax.Array, saved: tuple[jax.Array, ...]) -> Any:
            key = _wrap(key)
            if use.kind == "head":
                return contributions.of_head(saved, w, ct, reducer, key)
            if use.kind == "rows":
                right = jax.vmap(canonical.cotangents, 1, 1)(ct)
                ids = canonical.ids(saved[0])
                return None, contributions.of_rows(ids, right, use.shape[0], shared_ids, reducer, key)
            if use.kind == "conv":
                return None, contributions.of_conv(canonical, saved[0], ct, reducer, key)
            return None, contributions.of_dot(canonical, saved[0], ct, reducer, key)

        pull_all = self._over_outputs(pull)

        @jax.custom_vjp
        def call(slot: Any, tap: Any, key: Any, w: jax.Array, rest: tuple[jax.Array, ...]) -> Any:
            return use.forward(w, rest)

        def forward(slot: Any, tap: Any, key: Any, w: jax.Array, rest: tuple[jax.Array, ...]) -> Any:
            out, saved = use.forward(w, rest)
            return (out, saved), (slot, tap, key, w, rest, saved)

        def backward(residual: Any, cts: Any) -> Any:
            slot, tap, key, w, rest, saved = residual
            ct, pulled, share = cts[0], None, None
            if slot is not None:
                pulled, share = pull_all(ct, key, w, saved)
                share = share.astype(slot.dtype)
            elif use.kind == "head":
                pulled = contributions.of_head(saved, w, ct[:, None], None, None)[0][:, 0]
            if use.kind in ("dot", "conv"):
                (pulled,) = jax.vjp(lambda x: use.apply(w, x), rest[0])[1](ct)
            into_rest = {"rows": (None,), "head": (pulled, None)}.get(use.kind, (pulled,))
            return share, None if tap is None else ct, None, None, into_rest

        call.defvjp(forward, backward)
        return call

    # What comes out

    def _collect(
        self,
        shared: dict[int, jax.Array],
        collected: dict[Tap, jax.Array],
        saved: dict[Tap, tuple[jax.Array, ...]],
    ) -> dict[int, jax.Array]:
        results: dict[int, jax.Array] = {}

        def add(site: Site, share: jax.Array) -> None:
            """Add a share (iterations, ...), or (...) where no loop tells the layers apart, to its layers."""
            loop = self.plan.loop_of(site)
            gains: dict[int, Any] = {}  # of each layer, in each iteration
            for layer, gain in site.node.owners[0]:
                if layer >= 0:
                    gains[layer] = gains.get(layer, 0.0) + gain
                    continue
                for i, iteration in enumerate(self.plan.tables[-layer - 1][1]):
                    for own, times in iteration:
                        # A copy: a number, where the layer is the same in all iterations, or their gains so far.
                        gains[own] = gains.get(own, 0.0) + np.zeros(len(share))
                        gains[own][i] += gain * times
            for layer, gain in gains.items():
                # Features are linear in the gradient, the others quadratic.
                factor = np.sqrt(gain) if isinstance(self.reducer, Features) else np.asarray(gain)
                if loop is not None:
                    factor = np.broadcast_to(factor, len(share)).astype(share.dtype)
                    places = np.flatnonzero(factor)
                    part = jnp.tensordot(factor[places], share[places], axes=1, precision=EXACT)
                else:
                    part = share if factor == 1.0 else share * float(factor)
                results[layer] = results[layer] + part if layer in results else part

        done = set()
        for site in self.plan.sites:
            key = self._slot_key(site)
            if key not in shared or key in done:
                continue
            done.add(key)
            share = shared[key]  # (C, [iterations], ...)
            if self.plan.loop_of(site) is not None:
                share = jnp.moveaxis(share, 1, 0)
                share = jnp.moveaxis(share, 1, 2) if self.reducer.crossed else share
            elif self.reducer.crossed:
                share = jnp.moveaxis(share, 0, 1)
            add(site, share)
        for site in self.tapped_sites:
            add(site, self._group(site, collected, saved))
        return results

    def _group(
        self,
        site: Site,
        collected: dict[Tap, jax.Array],
        saved: dict[Tap, tuple[jax.Array, ...]],
    ) -> jax.Array:
        """Return the share of a parameter with several uses: (iterations, ...) if these tell its layers, else (...)."""
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
            return shared_parameters.of_group(site.canonicals, residuals, cotangents, weight, self.reducer, direct)

        each = (residuals, cotangents, weight)
        if not sliced:
            return one(jax.tree.map(lambda x: x[0], each))
        share = jax.lax.map(one, each)
        loop = self.plan.loop_of(site)
        if loop is None:
            return share.sum(0)
        share = share.reshape(*sliced, *share.shape[1:])
        axis = site.node.loops.index(loop)
        return share.sum(tuple(i for i in range(len(sliced)) if i != axis))


def _wrap(key: Any) -> Any:
    return None if key is None else jax.random.wrap_key_data(key)
