"""The prefix tree of many token sequences: what they share is one node, to be decoded once.

A radix tree. A node holds a segment of ids; the sequence of a node is that of its ancestors and its own. Requests
are visited depth first, the subtree with the most requests last: whatever is decoded and still needed then lies on
the path of the request that comes next, so that one path is all that memory must be able to hold, and at most
``log2(requests)`` branching nodes wait for further children at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(eq=False, slots=True)
class Node:
    """A segment of ids that some requests share.

    Attributes:
        tokens: the ids of the segment; an answer's grows as it is generated.
        start: position of its first id in the sequence.
        parent: the segment before; ``None`` for the root, which is empty.
        children: the segments that follow, in the order of their visit.
        ends: requests whose sequence ends with this segment.
        left: requests below or here that are not finished.
        unadmitted: children that have not been given memory.
        seq: llama.cpp's sequence that holds it; −1 before it is admitted and once it is released.
        owns: it gives the sequence back when it is released (a last child takes its parent's over).
        cells: KV cells reserved for it.
        fed: ids decoded.
        growing: an answer: its segment is being generated.
    """

    tokens: list[int]
    start: int
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    left: int = 0
    unadmitted: int = 0
    seq: int = -1
    owns: bool = False
    cells: int = 0
    fed: int = 0
    growing: bool = False

    @property
    def end(self) -> int:
        """Position after its last id."""
        return self.start + len(self.tokens)


def prefix_tree(paths: Sequence[Sequence[int]], *, share: bool = True) -> tuple[Node, list[Node]]:
    """The radix tree of token sequences.

    Args:
        paths: ids, at least one each.
        share: ``False`` gives each sequence a segment of its own below the root.

    Returns:
        The root and, for each path, the node that it ends with.
    """
    root = Node([], 0)
    if not share:
        for i, path in enumerate(paths):
            root.children.append(Node(list(path), 0, root, ends=[i]))
        return root, list(root.children)
    # big-endian bytes of ids ≥ 0 sort as the ids do, and compare fast
    keys = [np.asarray(path, ">i4").tobytes() for path in paths]
    leaves: list[Node] = [root] * len(paths)
    top, last = root, np.empty(0, ">i4")
    for i in sorted(range(len(paths)), key=keys.__getitem__):
        path = np.frombuffer(keys[i], ">i4")
        n = min(len(path), len(last))
        differ = np.flatnonzero(path[:n] != last[:n])
        common = int(differ[0]) if len(differ) else n
        while top.parent is not None and top.start >= common:
            top = top.parent
        if top.end > common:
            top = _split(top, common)
        if len(path) > common:
            node = Node(path[common:].tolist(), common, top)
            top.children.append(node)
            top = node
        top.ends.append(i)
        leaves[i] = top
        last = path
    return root, leaves


def _split(node: Node, at: int) -> Node:
    """Cut a segment in two at a position; the new upper part is returned, the lower part keeps its identity."""
    upper = Node(node.tokens[: at - node.start], node.start, node.parent, [node])
    siblings = node.parent.children
    siblings[siblings.index(node)] = upper
    node.tokens, node.start, node.parent = node.tokens[at - node.start :], at, upper
    return upper


def visit(root: Node) -> Iterator[Node]:
    """Count requests, order children (most requests last, else the first in input order first), yield depth first."""
    downward = [root]
    for node in downward:
        downward.extend(node.children)
    first: dict[Node, int] = {}
    for node in reversed(downward):
        node.left = len(node.ends) + sum(child.left for child in node.children)
        node.unadmitted = len(node.children)
        first[node] = min([*node.ends, *(first[child] for child in node.children)], default=0)
        if len(node.children) > 1:
            heavy = max(node.children, key=lambda child: (child.left, first[child]))
            node.children.sort(key=lambda child: (child is heavy, first[child]))
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children))
