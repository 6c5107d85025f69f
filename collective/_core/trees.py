"""Nested structures of tensors, such as state dicts: dicts, lists and tuples, one in the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Path: TypeAlias = "tuple[Any, ...]"


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield (path, leaf) in an order that does not depend on the order in which a dict was filled."""
    if isinstance(tree, dict):
        for key in sorted(tree, key=lambda key: (type(key).__name__, str(key))):
            yield from leaves(tree[key], (*path, key))
    elif isinstance(tree, list | tuple):
        for number, child in enumerate(tree):
            yield from leaves(child, (*path, number))
    else:
        yield path, tree


def rebuild(tree: Any, make: Callable[[Path], Any], path: Path = ()) -> Any:
    """Return a structure like `tree`, with a new leaf at each path."""
    if isinstance(tree, dict):
        return {key: rebuild(child, make, (*path, key)) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        children = [rebuild(child, make, (*path, number)) for number, child in enumerate(tree)]
        if isinstance(tree, list):
            return children
        return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)
    return make(path)


def match(tree: Any, like: Any, what: str, than: str, path: Path = ()) -> dict[Path, Any]:
    """Return the leaves of a structure by the paths that another has; None stands for as many Nones as needed.

    Raises:
        ValueError: they are nested otherwise, or have other keys.
    """
    if tree is None:
        return {at: None for at, _ in leaves(like, path)}
    if isinstance(like, dict):
        if not isinstance(tree, dict) or set(tree) != set(like):
            raise ValueError(f"{what}{name(path)} has {_keys(tree)}, and {than} {_keys(like)}")
        parts = [match(tree[key], child, what, than, (*path, key)) for key, child in like.items()]
    elif isinstance(like, list | tuple):
        if not isinstance(tree, list | tuple) or len(tree) != len(like):
            raise ValueError(f"{what}{name(path)} has {_keys(tree)}, and {than} {_keys(like)}")
        pairs = enumerate(zip(tree, like, strict=True))
        parts = [match(child, other, what, than, (*path, number)) for number, (child, other) in pairs]
    else:
        return {path: tree}
    return {at: leaf for part in parts for at, leaf in part.items()}


def name(path: Path) -> str:
    """Return how an error names a place in a structure."""
    return "".join(f"[{key!r}]" for key in path)


def _keys(tree: Any) -> str:
    if isinstance(tree, dict):
        known = [repr(key) for key in tree]
        return f"the keys {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}"
    if isinstance(tree, list | tuple):
        return f"a {type(tree).__name__} of {len(tree)}"
    return f"a {type(tree).__name__}"
