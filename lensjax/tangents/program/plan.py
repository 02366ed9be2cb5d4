"""Where each parameter's per-example gradient can be read off a program, and where it has to be materialized.

Every value that is computed from parameters alone is a node. As long as nothing else reads the parameters that a node
is computed from, its gradient is their whole gradient, up to a rearrangement of the entries. So each parameter is
followed through reshapes, casts, stacks, disjoint slices and scans to the operation where it meets the examples:

- one product, row lookup or fused head: its contribution to the kernel is computed from the operation's inputs and
  cotangents;
- several of them (tied weights, weights shared by layers or by the iterations of a loop): their inputs and cotangents
  are collected, since the uses have cross terms;
- anything else: the value is *materialized*: it is copied for every example, and so its gradient exists for every
  example.

Materializing is correct for every program, so it is what happens to whatever is not recognised; the report says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from lensjax.tangents.program import ir
from lensjax.tangents.program.analysis import DependencyAnalysis, LayerWeights, Node
from lensjax.tangents.program.operations import FactorLayout, ParameterUse, factor_layout


@dataclasses.dataclass(eq=False)
class GradientSite:
    """A place where a contribution to the kernel is computed, for one node.

    Attributes
    ----------
    node : Node
        Where the gradient is taken.
    how : {"single", "shared", "materialized"}
        From the factors of one use, from those of several uses, or from per-example gradients.
    uses : the operations that read the node; none for "materialized"
    layouts : for each use, how its factors become matrices of one common shape
    loops_of_uses : for "shared", the loops around each use that the node is not sliced by
    reason : why it is materialized
    index : position among the plan's sites
    """

    node: Node
    how: Literal["single", "shared", "materialized"]
    uses: tuple[ParameterUse, ...] = ()
    layouts: tuple[FactorLayout, ...] = ()
    loops_of_uses: tuple[tuple[ir.Operation, ...], ...] = ()
    reason: str = ""
    index: int = -1


@dataclasses.dataclass(eq=False)
class Plan:
    """How the gradients of a program are computed.

    Attributes
    ----------
    block : the program
    batched : values that depend on the examples
    sites : where contributions are computed
    materialized : value -> its site
    use_sites : operation -> (position among the site's uses, site)
    per_iteration_layers : for the layers -1, -2, ...: a loop, and the weighted layers of each of its iterations
    """

    block: ir.Block
    batched: set[ir.Value]
    sites: list[GradientSite]
    materialized: dict[ir.Value, GradientSite]
    use_sites: dict[ir.Operation, tuple[int, GradientSite]]
    per_iteration_layers: list[tuple[ir.Operation, LayerWeights]]

    def loop_of(self, site: GradientSite) -> ir.Operation | None:
        """Return the loop whose iterations have different layers at the site, if any."""
        return next(
            (self.per_iteration_layers[-layer - 1][0] for layer, _ in site.node.layer_weights[0] if layer < 0), None
        )


def make_plan(block: ir.Block, parameters: int, layers: Sequence[int | None]) -> Plan:
    """Decide how the kernel of a program is computed.

    Parameters
    ----------
    block : ir.Block
        Its first `parameters` inputs are parameters, the others belong to one example.
    parameters : int
    layers : for each parameter the number of its layer, or None where it is constant
    """
    materialized: dict[ir.Value, str] = {}
    while True:
        analysis = DependencyAnalysis(block, parameters, layers, materialized)
        chosen = _SiteChooser(analysis)
        if not chosen.to_materialize:
            break
        materialized |= chosen.to_materialize
    for i, site in enumerate(chosen.sites):
        site.index = i
    return Plan(
        block,
        analysis.batched,
        chosen.sites,
        {site.node.value: site for site in chosen.sites if site.how == "materialized"},
        {use.operation: (i, site) for site in chosen.sites for i, use in enumerate(site.uses)},
        analysis.per_iteration_layers,
    )


class _SiteChooser:
    """Follow each parameter to the sites of its gradient; collect what has to be materialized."""

    def __init__(self, analysis: DependencyAnalysis) -> None:
        self.materialized = analysis.materialized
        self.sites: list[GradientSite] = []
        self.to_materialize: dict[ir.Value, str] = {}
        self.visited: set[Node] = set()
        for root in analysis.roots:
            self.visit(root)
        # A materialized value that is not reached any more would be counted in addition to what replaced it: then the
        # parameters themselves are materialized.
        for node in analysis.materialized_nodes.values():
            if node not in self.visited:
                self.to_materialize.update(
                    {r.value: "other uses of it are" for r in analysis.roots if r.leaves & node.leaves}
                )
        self.to_materialize = {
            value: reason for value, reason in self.to_materialize.items() if value not in self.materialized
        }

    def visit(self, node: Node) -> None:
        """Find the sites of a node's gradient."""
        if node in self.visited:
            return
        self.visited.add(node)
        if node.value in self.materialized:
            self.sites.append(GradientSite(node, "materialized", reason=self.materialized[node.value]))
            return
        if not node.readers:
            return
        if len(node.readers) == 1:
            what = node.readers[0].what
            if isinstance(what, ParameterUse):
                layout = factor_layout(what, tuple(range(len(node.value.aval.shape))), None)
                assert layout is not None
                self.sites.append(GradientSite(node, "single", (what,), (layout,), ((),)))
                return
            if isinstance(what, Node) and what.origin != "repeat" and self.is_only_path(what):
                self.visit(what)
                return
            if isinstance(what, str):
                self.to_materialize[node.value] = f"used by {what}"
                return
        elif self.are_disjoint(node):
            for reader in node.readers:
                assert isinstance(reader.what, Node)
                self.visit(reader.what)
            return
        found: list[tuple[ParameterUse, tuple[int, ...], tuple[ir.Operation, ...]]] = []
        followed = node.uniform and self.collect_uses(node, tuple(range(len(node.value.aval.shape))), (), found)
        if followed and not found:
            return
        site = self.shared_site(node, found) if followed else None
        if site is not None:
            self.sites.append(site)
        else:
            self.to_materialize[node.value] = self.materialization_reason(node)

    def is_only_path(self, child: Node) -> bool:
        """Whether the whole gradient of the child's parents goes through the child, and its layers can be separated."""
        if any(len(p.readers) != 1 for p in child.parents):
            return False
        if child.origin == "scan" or child.uniform:
            return True
        # Layers that differ along the leading axis can be separated by a scan over it, and by nothing else.
        if len(child.readers) != 1 or not isinstance(child.readers[0].what, Node):
            return False
        following = child.readers[0].what
        return following.origin == "scan" or (not following.uniform and self.is_only_path(following))

    def are_disjoint(self, node: Node) -> bool:
        """Whether all readers are slices that do not overlap."""
        regions = []
        for reader in node.readers:
            if not isinstance(reader.what, Node) or reader.what.origin != "slice":
                return False
            regions.append(reader.what.region)
        return all(
            any(a[1] <= b[0] or b[1] <= a[0] for a, b in zip(one, other, strict=True))
            for i, one in enumerate(regions)
            for other in regions[:i]
        )

    def shared_site(
        self, node: Node, found: list[tuple[ParameterUse, tuple[int, ...], tuple[ir.Operation, ...]]]
    ) -> GradientSite | None:
        """Return the site of a node with several uses, or None if their factors do not have a common shape."""
        for rows in range(1, max(2, len(node.value.aval.shape))):
            layouts = [factor_layout(use, permutation, rows) for use, permutation, _ in found]
            if all(c is not None for c in layouts):
                uses = tuple(use for use, _, _ in found)
                return GradientSite(
                    node, "shared", uses, tuple(c for c in layouts if c), tuple(loops for *_, loops in found)
                )
        return None

    def collect_uses(
        self,
        node: Node,
        permutation: tuple[int, ...],
        loops: tuple[ir.Operation, ...],
        found: list[tuple[ParameterUse, tuple[int, ...], tuple[ir.Operation, ...]]],
    ) -> bool:
        """Collect all uses of a node, with how its axes are permuted there and the loops around; False if others."""
        for reader in node.readers:
            what = reader.what
            if isinstance(what, ParameterUse):
                found.append((what, permutation, loops))
                continue
            if not isinstance(what, Node) or len(what.parents) != 1 or what.value in self.materialized:
                return False
            if what.origin == "repeat":
                assert what.loop is not None
                inner, around = permutation, (*loops, what.loop)
            elif what.origin == "permute" and what.permutation is not None:
                inner, around = tuple(permutation[i] for i in what.permutation), loops
            else:
                return False
            if not self.collect_uses(what, inner, around, found):
                return False
        return True

    def materialization_reason(self, node: Node) -> str:
        """Return why a node has to be materialized, for the report."""

        def names(n: Node) -> list[str]:
            out: list[str] = []
            for reader in n.readers:
                what = reader.what
                if isinstance(what, Node):
                    out.extend([*names(what)])
                    if what.origin == "repeat":
                        out.append("a loop")
                else:
                    out.append(what if isinstance(what, str) else what.operation.name)
            return out

        return "used more than once, by " + ", ".join(dict.fromkeys(names(node)))
