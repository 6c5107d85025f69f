"""The tree that announcements climb: a heap with FAN_OUT children a node, rank 0 at the root."""

from __future__ import annotations

FAN_OUT = 8
"""Up to nine members announce in one hop up and one down; 1,000 in four and four."""


def parent(rank: int) -> int:
    """Return the parent of a rank other than 0."""
    return (rank - 1) // FAN_OUT


def depth(rank: int) -> int:
    """Return how far below rank 0 a rank is."""
    return 1 + depth(parent(rank)) if rank else 0


def children(rank: int, size: int) -> range:
    """Return the children of a rank."""
    return range(min(size, FAN_OUT * rank + 1), min(size, FAN_OUT * rank + 1 + FAN_OUT))


def neighbours(rank: int, size: int) -> list[int]:
    """Return parent and children of a rank."""
    return ([parent(rank)] if rank else []) + list(children(rank, size))


def subtree_size(rank: int, size: int) -> int:
    """Return how many ranks hang below a rank, itself included."""
    first, last, total = rank, rank, 0
    while first < size:
        total += min(last, size - 1) - first + 1
        first, last = FAN_OUT * first + 1, FAN_OUT * last + FAN_OUT
    return total
