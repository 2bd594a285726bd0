"""Flatten, split and merge parameter trees: nested dicts of arrays, addressed by paths of keys joined with "/".

This is the only definition of a parameter path: weight names, sharding rules, learning-rate groups and freezing all
use it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

Tree = dict[str, Any]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested dict to {"a/b/c": leaf}, in sorted key order."""
    flat = {}
    for key in sorted(tree):
        path = f"{prefix}{key}"
        if isinstance(tree[key], Mapping):
            flat.update(flatten(tree[key], f"{path}/"))
        else:
            flat[path] = tree[key]
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Build a nested dict from {"a/b/c": leaf}; the inverse of `flatten`."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def leaves_by_path(pytree: Any) -> dict[str, Any]:
    """Map any pytree to {"opt_state/0/mu/embed/embedding": leaf}, in the order of jax.tree.leaves."""
    paths, _ = jax.tree_util.tree_flatten_with_path(pytree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def map_with_path(function: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> Tree:
    """Apply `function(path, leaf)` to every leaf."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def split(tree: Mapping[str, Any], predicate: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Split a tree into (leaves whose path satisfies `predicate`, the other leaves); `merge` is the inverse."""
    flat = flatten(tree)
    chosen = {path: leaf for path, leaf in flat.items() if predicate(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten(chosen), unflatten(rest)


def merge(a: Mapping[str, Any], b: Mapping[str, Any]) -> Tree:
    """Merge two trees with disjoint leaves."""
    return unflatten(dict(sorted({**flatten(a), **flatten(b)}.items())))
