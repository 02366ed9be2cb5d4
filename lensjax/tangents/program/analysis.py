"""Dependencies in a program: which values depend on the examples, which on parameters alone, and who reads these."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import primitives as jp

from lensjax.tangents.program import ir
from lensjax.tangents.program.operations import ParameterUse, parameter_use

WeightedLayers = tuple[tuple[int, float], ...]
"""(layer, squared gain) for each parameter that an entry is a sum of.

A negative layer is a placeholder for layers that depend on the iteration of a loop, see `per_iteration_layers`.
"""

LayerWeights = tuple[WeightedLayers, ...]
"""The weighted layers of each index of the leading axis, or one element if they are the same for all indices."""

SAME_ENTRIES = {
    jp.reshape_p,
    jp.transpose_p,
    jp.squeeze_p,
    jp.rev_p,
    jp.neg_p,
    jp.copy_p,
    jp.convert_element_type_p,
    jp.broadcast_in_dim_p,
    jp.name_p,
    jp.sharding_constraint_p,
}
"""Operations whose output has each entry of their input exactly once, moved, cast or negated."""

IDENTITIES = {jp.copy_p, jp.convert_element_type_p, jp.name_p, jp.sharding_constraint_p}
"""Operations that change neither the value nor the position of an entry."""


@dataclasses.dataclass(eq=False)
class Node:
    """A value that is computed from parameters alone and carries their gradient.

    Attributes
    ----------
    value : ir.Value
    leaves : indices of the parameters that it is computed from
    layer_weights : see `LayerWeights`
    origin : {"leaf", "entries", "permute", "slice", "join", "scan", "repeat"}
        What computes it from its parents; "leaf": it is a parameter itself.
    parents : the nodes that it is computed from
    permutation : of the parent's axes, for "permute"
    region : (start, stop) along each axis of the parent, for "slice"
    loop : the scan that it is an input of, for "scan" and "repeat"
    loops : all scans that slice it, outermost first
    readers : what consumes it
    """

    value: ir.Value
    leaves: frozenset[int]
    layer_weights: LayerWeights
    origin: str = "leaf"
    parents: tuple[Node, ...] = ()
    permutation: tuple[int, ...] | None = None
    region: tuple[tuple[int, int], ...] = ()
    loop: ir.Operation | None = None
    loops: tuple[ir.Operation, ...] = ()
    readers: list[Reader] = dataclasses.field(default_factory=list)

    @property
    def uniform(self) -> bool:
        """Whether all entries have the same layers with the same gain."""
        return len(self.layer_weights) == 1


@dataclasses.dataclass(eq=False)
class Reader:
    """One consumer of a node: another node, a use with known factors, or the name of anything else.

    The last kind needs the node materialized.
    """

    what: Node | ParameterUse | str


class DependencyAnalysis:
    """Dependencies in a program: the values that depend on examples, the nodes, and the readers of the nodes.

    Parameters
    ----------
    block : the program
    parameters : how many of its inputs, the first ones, are parameters
    layers : number of each parameter's layer, None where it is constant
    materialized : values to be copied for every example, with the reason

    Attributes
    ----------
    batched : values that depend on the examples
    nodes : value -> node, for values computed from parameters alone
    materialized_nodes : the same for values that are materialized
    roots : the nodes of the parameters
    per_iteration_layers : for the placeholders -1, -2, ...: a loop, and the weighted layers of each of its iterations
    live : operations that a gradient flows back through
    """

    def __init__(
        self, block: ir.Block, parameters: int, layers: Sequence[int | None], materialized: dict[ir.Value, str]
    ) -> None:
        self.materialized = materialized
        self.batched: set[ir.Value] = set()
        self.nodes: dict[ir.Value, Node] = {}
        self.materialized_nodes: dict[ir.Value, Node] = {}
        self.roots: list[Node] = []
        self.per_iteration_layers: list[tuple[ir.Operation, LayerWeights]] = []
        for i, value in enumerate(block.inputs):
            if i >= parameters:
                self.batched.add(value)
            elif (layer := layers[i]) is not None and ir.is_float(value):
                self.roots.append(self.define(Node(value, frozenset([i]), (((layer, 1.0),),))))
        self.live = _with_gradient(block)
        self.walk(block)
        self.read_outputs(block, "output")

    def define(self, node: Node) -> Node:
        """Register a node; one that is materialized counts as depending on the examples."""
        if node.value in self.materialized:
            self.materialized_nodes[node.value] = node
            self.batched.add(node.value)
        else:
            self.nodes[node.value] = node
        return node

    def node(self, atom: ir.Atom) -> Node | None:
        """Return the node that a value is, if it is one."""
        return self.nodes.get(atom) if isinstance(atom, ir.Value) else None

    def is_batched(self, atom: ir.Atom) -> bool:
        """Whether a value depends on the examples."""
        return isinstance(atom, ir.Value) and atom in self.batched

    def read_outputs(self, block: ir.Block, what: str) -> None:
        """Register the outputs of a block as readers of the nodes among them."""
        for atom in block.outputs:
            if (node := self.node(atom)) is not None:
                node.readers.append(Reader(what))

    def walk(self, block: ir.Block) -> None:
        """Analyse the operations of a block."""
        for operation in block.operations:
            if operation.kind == "remat":
                self.remat(operation)
            elif operation.kind == "scan":
                self.scan(operation)
            else:
                self.primitive(operation)

    def alias(self, inner: ir.Value, outer: ir.Atom) -> None:
        """Treat a value inside a region like the one outside."""
        if self.is_batched(outer):
            self.batched.add(inner)
        elif (node := self.node(outer)) is not None:
            self.nodes[inner] = node

    def remat(self, operation: ir.Operation) -> None:
        """Analyse a checkpointed region, whose inputs are the values outside."""
        assert operation.body is not None
        for inner, outer in zip(operation.body.inputs, operation.inputs, strict=True):
            self.alias(inner, outer)
        self.walk(operation.body)
        self.read_outputs(operation.body, "remat output")
        for inside, out in zip(operation.body.outputs, operation.outputs, strict=True):
            if self.is_batched(inside):
                self.batched.add(out)

    def scan(self, operation: ir.Operation) -> None:
        """Analyse a loop: nodes among its constants are repeated, nodes among its scanned inputs are sliced."""
        body = operation.body
        assert body is not None
        consts, carry = operation.params["num_consts"], operation.params["num_carry"]
        moving = [self.is_batched(a) or self.node(a) is not None for a in operation.inputs]
        # A carry depends on the examples if it does at the start or after some iteration.
        while True:
            after = _depends(body, moving)
            wider = moving[:consts] + [a or b for a, b in zip(moving[consts:], after[:carry], strict=False)]
            wider = wider[: consts + carry] + moving[consts + carry :]
            if wider == moving:
                break
            moving = wider
        for i, (inner, outer) in enumerate(zip(body.inputs, operation.inputs, strict=True)):
            node = self.node(outer)
            if consts <= i < consts + carry:
                if moving[i]:
                    self.batched.add(inner)
                if node is not None:
                    node.readers.append(Reader("scan carry"))
            elif node is not None and i < consts:
                child = Node(
                    inner, node.leaves, node.layer_weights, "repeat", (node,), loop=operation, loops=node.loops
                )
                node.readers.append(Reader(self.define(child)))
            elif node is not None:
                layer_weights, loops = node.layer_weights, (*node.loops, operation)
                if not node.uniform:
                    self.per_iteration_layers.append((operation, layer_weights))
                    layer_weights = (((-len(self.per_iteration_layers), 1.0),),)
                child = Node(inner, node.leaves, layer_weights, "scan", (node,), loop=operation, loops=loops)
                node.readers.append(Reader(self.define(child)))
            elif self.is_batched(outer):
                self.batched.add(inner)
        self.walk(body)
        self.read_outputs(body, "scan output")
        for i, (inside, out) in enumerate(zip(body.outputs, operation.outputs, strict=True)):
            if self.is_batched(inside) or (i < carry and moving[consts + i]) or self.node(inside) is not None:
                self.batched.add(out)

    def primitive(self, operation: ir.Operation) -> None:
        """Analyse one equation."""
        if operation not in self.live:
            if any(self.is_batched(a) for a in operation.inputs):
                self.batched.update(operation.outputs)
            return  # no gradient flows back through it, so it is no reader
        nodes = [self.node(a) for a in operation.inputs]
        present = [n for n in nodes if n is not None]
        if len(present) == 1:
            which = next(i for i, n in enumerate(nodes) if n is not None)
            use = parameter_use(operation, which, self.is_batched)
            if use is not None:
                present[0].readers.append(Reader(use))
                self.batched.update(operation.outputs)
                return
        if any(self.is_batched(a) for a in operation.inputs):
            self.batched.update(operation.outputs)
        elif present and (children := self.children(operation, nodes)) is not None:
            for child in children:
                self.define(child)
            for parent in dict.fromkeys(present):
                for _ in range(present.count(parent)):
                    parent.readers.extend(Reader(child) for child in children)
            return
        elif present:
            self.batched.update(operation.outputs)
        for n in present:
            n.readers.append(Reader(operation.name))

    def children(self, operation: ir.Operation, nodes: list[Node | None]) -> list[Node] | None:
        """Return the nodes that an operation on parameters alone computes, or None if the operation is not known."""
        primitive, params, out = operation.primitive, operation.params, operation.outputs[0]
        parent = next(n for n in nodes if n is not None)
        shape = parent.value.aval.shape

        def child(origin: str, weights: LayerWeights | None = None, value: ir.Value = out, **details: Any) -> Node:
            weights = parent.layer_weights if weights is None else weights
            return Node(value, parent.leaves, weights, origin, (parent,), **details, loops=parent.loops)

        if ir.is_complex(out):
            return None  # a real parameter has only the real part of such a gradient
        if primitive in SAME_ENTRIES and math.prod(out.aval.shape) == math.prod(shape):
            if not parent.uniform and primitive not in IDENTITIES and primitive is not jp.neg_p:
                return None
            if primitive is jp.transpose_p:
                return [child("permute", permutation=tuple(params["permutation"]))]
            identity = tuple(range(len(shape)))
            return [child("permute", permutation=identity) if primitive in IDENTITIES else child("entries")]
        if primitive in (jp.mul_p, jp.div_p):
            other = next((a for a, n in zip(operation.inputs, nodes, strict=True) if n is None), None)
            gain = None if other is None else ir.scalar(other)
            if gain is None or (primitive is jp.div_p and nodes[0] is None) or out.aval.shape != shape:
                return None
            if primitive is jp.div_p:
                gain = 1.0 / gain
            layer_weights = tuple(
                tuple((layer, g * gain**2) for layer, g in weighted_layers) for weighted_layers in parent.layer_weights
            )
            return [child("entries", layer_weights)]
        if primitive in (jp.add_p, jp.sub_p):
            return self.sum(operation, nodes)
        if primitive in (jp.concatenate_p, _stack_p(operation)):
            return self.join(operation, nodes)
        if primitive is jp.slice_p and parent.uniform and params["strides"] in (None, (1,) * len(shape)):
            region = tuple(zip(params["start_indices"], params["limit_indices"], strict=True))
            return [child("slice", region=region)]
        if primitive.name == "split" and parent.uniform:
            axis, start, pieces = params["axis"], 0, []
            for size, value in zip(params["sizes"], operation.outputs, strict=True):
                region = tuple((start, start + int(size)) if i == axis else (0, n) for i, n in enumerate(shape))
                pieces.append(child("slice", value=value, region=region))
                start += int(size)
            return pieces
        if primitive is jp.dynamic_slice_p and parent.uniform and nodes[0] is parent:
            starts = [ir.scalar(a) for a in operation.inputs[1:]]
            sizes = params["slice_sizes"]
            if any(s is None for s in starts):
                return None
            clipped = [min(max(int(s or 0), 0), n - k) for s, n, k in zip(starts, shape, sizes, strict=True)]
            return [child("slice", region=tuple((s, s + k) for s, k in zip(clipped, sizes, strict=True)))]
        return None

    def sum(self, operation: ir.Operation, nodes: list[Node | None]) -> list[Node] | None:
        """Return the node for a sum or difference of parameters and constants."""
        out = operation.outputs[0]
        present = [n for n in nodes if n is not None]
        if any(n.value.aval.shape != out.aval.shape or not n.uniform for n in present):
            return None
        if len({id(n) for n in present}) != len(present) or len({n.loops for n in present}) != 1:
            return None
        totals: dict[int, float] = {}
        for n in present:
            for layer, gain in n.layer_weights[0]:
                totals[layer] = totals.get(layer, 0.0) + gain
        layer_weights = (tuple(sorted(totals.items())),)
        if len({self.per_iteration_layers[-layer - 1][0] for layer in totals if layer < 0}) > 1:
            return None
        leaves = frozenset().union(*(n.leaves for n in present))
        origin = "join" if len(present) > 1 else "entries"
        return [Node(out, leaves, layer_weights, origin, tuple(present), loops=present[0].loops)]

    def join(self, operation: ir.Operation, nodes: list[Node | None]) -> list[Node] | None:
        """Return the node for a concatenation or a stack of parameters and constants."""
        out = operation.outputs[0]
        stacked = operation.primitive is not jp.concatenate_p
        axis = operation.params["axis"] if stacked else operation.params["dimension"]
        present = [n for n in nodes if n is not None]
        if len({id(n) for n in present}) != len(present) or len({n.loops for n in present}) != 1:
            return None
        rows: list[tuple[tuple[int, float], ...]] = []
        for atom, n in zip(operation.inputs, nodes, strict=True):
            length = 1 if stacked else atom.aval.shape[axis]
            if n is not None and not n.uniform and (stacked or axis != 0):
                return None
            layer_weights = ((),) if n is None else n.layer_weights
            rows.extend(layer_weights if len(layer_weights) > 1 else layer_weights * length)
        layer_weights = (rows[0],) if len(set(rows)) == 1 else tuple(rows)
        if len(layer_weights) > 1 and (axis != 0 or any(layer < 0 for row in rows for layer, _ in row)):
            return None
        leaves = frozenset().union(*(n.leaves for n in present))
        return [Node(out, leaves, layer_weights, "join", tuple(present), loops=present[0].loops)]


def _stack_p(operation: ir.Operation) -> Any:
    # `stack` has no name in jax.extend.core.primitives.
    return operation.primitive if operation.primitive.name == "stack" else None


def _with_gradient(block: ir.Block) -> set[ir.Operation]:
    """Return the operations through which a gradient of the outputs can flow back to floating-point inputs."""
    found: set[ir.Operation] = set()

    def visit(block: ir.Block) -> None:
        live = {a for a in block.outputs if ir.is_float(a)}
        for operation in reversed(block.operations):
            if operation.primitive is jp.stop_gradient_p or not any(
                o in live and ir.is_float(o) for o in operation.outputs
            ):
                continue
            found.add(operation)
            live.update(a for a in operation.inputs if ir.is_float(a))
            if operation.body is not None:
                visit(operation.body)  # as if all its outputs were read: at worst too much is materialized

    visit(block)
    return found


def _depends(block: ir.Block, moving: Sequence[bool]) -> list[bool]:
    """Return which outputs of a block depend on the inputs marked `moving`."""
    marked = {v for v, m in zip(block.inputs, moving, strict=True) if m}
    for operation in block.operations:
        # Regions are treated as one operation: at worst too much is marked, which costs copies, not exactness.
        if any(isinstance(a, ir.Value) and a in marked for a in operation.inputs):
            marked.update(operation.outputs)
    return [isinstance(a, ir.Value) and a in marked for a in block.outputs]
