"""Where each parameter's per-example gradient can be read off a program, and where it has to be materialised.

Every value that is computed from parameters alone is a node. A node's gradient is the whole gradient of what it was
made from, up to a rearrangement of its entries, as long as nothing else reads those parameters; so the way from a
parameter is followed through reshapes, casts, stacks, disjoint slices and scans to the operation that meets the
examples. What is found there decides:

- one product, row lookup or fused head: the share of the kernel comes from the operation's inputs and cotangents;
- several of them (tied weights, weights shared by layers or by the iterations of a loop): their inputs and cotangents
  are collected, since the uses have cross terms;
- anything else: the value is *lifted*, that is copied for every example, and its gradient exists for every example.

Lifting is right for every program, so whatever is not recognised is lifted, and the report says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from lensjax.tangents.program import ir
from lensjax.tangents.program.analysis import Classifier, Node, Owners
from lensjax.tangents.program.operations import Canonical, Use, split_of


@dataclasses.dataclass(eq=False)
class Site:
    """A place where a share of the kernel comes out, for one node.

    Attributes
    ----------
    node : Node
        Where the gradient is taken.
    how : {"share", "group", "lift"}
    uses : the operations that are tapped; none for "lift"
    canonicals : for each use, how its factors become matrices of one common shape
    loops_of_uses : for "group", the loops around each use that the node is not sliced by
    reason : why it was lifted
    index : position among the plan's sites
    """

    node: Node
    how: Literal["share", "group", "lift"]
    uses: tuple[Use, ...] = ()
    canonicals: tuple[Canonical, ...] = ()
    loops_of_uses: tuple[tuple[ir.Operation, ...], ...] = ()
    reason: str = ""
    index: int = -1


@dataclasses.dataclass(eq=False)
class Plan:
    """What to do with a program.

    Attributes
    ----------
    block : the program
    batched : values that depend on the examples
    sites : where shares come out
    lifted : value -> its site
    tapped : operation -> (position among the site's uses, site)
    tables : what the negative layers -1, -2, ... mean: a loop, and the owner in each of its iterations
    """

    block: ir.Block
    batched: set[ir.Value]
    sites: list[Site]
    lifted: dict[ir.Value, Site]
    tapped: dict[ir.Operation, tuple[int, Site]]
    tables: list[tuple[ir.Operation, Owners]]

    def loop_of(self, site: Site) -> ir.Operation | None:
        """Return the loop whose iterations tell the site's layers apart, if any."""
        return next((self.tables[-layer - 1][0] for layer, _ in site.node.owners[0] if layer < 0), None)


def make_plan(block: ir.Block, parameters: int, layers: Sequence[int | None]) -> Plan:
    """Decide how the kernel of a program is computed.

    Parameters
    ----------
    block : ir.Block
        Its first `parameters` inputs are parameters, the others belong to one example.
    parameters : int
    layers : for each parameter the number of its layer, or None where it is held constant
    """
    lifted: dict[ir.Value, str] = {}
    while True:
        facts = Classifier(block, parameters, layers, lifted)
        chosen = _Chooser(facts)
        if not chosen.lift:
            break
        lifted |= chosen.lift
    for i, site in enumerate(chosen.sites):
        site.index = i
    return Plan(
        block,
        facts.batched,
        chosen.sites,
        {site.node.value: site for site in chosen.sites if site.how == "lift"},
        {use.operation: (i, site) for site in chosen.sites for i, use in enumerate(site.uses)},
        facts.tables,
    )


class _Chooser:
    """Follow each parameter to where its share comes out; collect what has to be lifted for that."""

    def __init__(self, facts: Classifier) -> None:
        self.lifted = facts.lifted
        self.sites: list[Site] = []
        self.lift: dict[ir.Value, str] = {}
        self.settled: set[Node] = set()
        for root in facts.roots:
            self.settle(root)
        # A lifted value that is not reached any more would be counted beside what replaced it: give up on its way.
        for node in facts.lifted_nodes.values():
            if node not in self.settled:
                self.lift.update({r.value: "other uses of it are" for r in facts.roots if r.leaves & node.leaves})
        self.lift = {value: why for value, why in self.lift.items() if value not in self.lifted}

    def settle(self, node: Node) -> None:
        if node in self.settled:
            return
        self.settled.add(node)
        if node.value in self.lifted:
            self.sites.append(Site(node, "lift", reason=self.lifted[node.value]))
            return
        if not node.readers:
            return
        if len(node.readers) == 1:
            what = node.readers[0].what
            if isinstance(what, Use):
                canonical = split_of(what, tuple(range(len(node.value.aval.shape))), None)
                assert canonical is not None
                self.sites.append(Site(node, "share", (what,), (canonical,), ((),)))
                return
            if isinstance(what, Node) and what.made_by != "repeat" and self.sole(what):
                self.settle(what)
                return
            if isinstance(what, str):
                self.lift[node.value] = f"used by {what}"
                return
        elif self.disjoint(node):
            for reader in node.readers:
                assert isinstance(reader.what, Node)
                self.settle(reader.what)
            return
        found: list[tuple[Use, tuple[int, ...], tuple[ir.Operation, ...]]] = []
        followed = node.uniform and self.ends(node, tuple(range(len(node.value.aval.shape))), (), found)
        if followed and not found:
            return
        group = self.group(node, found) if followed else None
        if group is not None:
            self.sites.append(group)
        else:
            self.lift[node.value] = self.why(node)

    def sole(self, child: Node) -> bool:
        """Whether all gradient of the child's parents goes through the child, and its layers stay apart."""
        if any(len(p.readers) != 1 for p in child.parents):
            return False
        if child.made_by == "scan" or child.uniform:
            return True
        # Layers that differ along the leading axis can be told apart by a scan over it, and by nothing else.
        if len(child.readers) != 1 or not isinstance(child.readers[0].what, Node):
            return False
        following = child.readers[0].what
        return following.made_by == "scan" or (not following.uniform and self.sole(following))

    def disjoint(self, node: Node) -> bool:
        """Whether all readers are slices that do not overlap."""
        regions = []
        for reader in node.readers:
            if not isinstance(reader.what, Node) or reader.what.made_by != "slice":
                return False
            regions.append(reader.what.region)
        return all(
            any(a[1] <= b[0] or b[1] <= a[0] for a, b in zip(one, other, strict=True))
            for i, one in enumerate(regions)
            for other in regions[:i]
        )

    def group(self, node: Node, found: list[tuple[Use, tuple[int, ...], tuple[ir.Operation, ...]]]) -> Site | None:
        for rows in range(1, max(2, len(node.value.aval.shape))):
            canonicals = [split_of(use, permutation, rows) for use, permutation, _ in found]
            if all(c is not None for c in canonicals):
                uses = tuple(use for use, _, _ in found)
                return Site(node, "group", uses, tuple(c for c in canonicals if c), tuple(loops for *_, loops in found))
        return None

    def ends(
        self,
        node: Node,
        permutation: tuple[int, ...],
        loops: tuple[ir.Operation, ...],
        found: list[tuple[Use, tuple[int, ...], tuple[ir.Operation, ...]]],
    ) -> bool:
        """Collect all uses of a node, with how its axes are permuted there and the loops around; False if others."""
        for reader in node.readers:
            what = reader.what
            if isinstance(what, Use):
                found.append((what, permutation, loops))
                continue
            if not isinstance(what, Node) or len(what.parents) != 1 or what.value in self.lifted:
                return False
            if what.made_by == "repeat":
                assert what.loop is not None
                inner, around = permutation, (*loops, what.loop)
            elif what.made_by == "permute" and what.permutation is not None:
                inner, around = tuple(permutation[i] for i in what.permutation), loops
            else:
                return False
            if not self.ends(what, inner, around, found):
                return False
        return True

    def why(self, node: Node) -> str:
        """Say why a node has to be lifted."""

        def names(n: Node) -> list[str]:
            out: list[str] = []
            for reader in n.readers:
                what = reader.what
                if isinstance(what, Node):
                    out.extend([*names(what)])
                    if what.made_by == "repeat":
                        out.append("a loop")
                else:
                    out.append(what if isinstance(what, str) else what.operation.name)
            return out

        return "used more than once, by " + ", ".join(dict.fromkeys(names(node)))
