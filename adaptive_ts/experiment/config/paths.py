"""The fields of nested dataclasses, addressed by path: ``train.steps``."""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin


def leaf_types(cls: type) -> dict[str, Any]:
    """Every field's path and type, in order: ``{"seed": int, ..., "train.steps": int}``."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
            found |= {f"{f.name}.{path}": kind for path, kind in leaf_types(f.type).items()}
        else:
            found[f.name] = f.type
    return found


def leaves(node: Any) -> dict[str, Any]:
    """Every field's path and value."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{f.name}.{path}": v for path, v in leaves(value).items()}
        else:
            found[f.name] = value
    return found


def flatten(nested: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """The same of nested dicts; what ``cls`` has no group for is kept as it is."""
    types_of = {f.name: f.type for f in dataclasses.fields(cls) if isinstance(f.type, type)}
    groups = {name: kind for name, kind in types_of.items() if dataclasses.is_dataclass(kind)}
    found: dict[str, Any] = {}
    for name, value in nested.items():
        if name in groups and isinstance(value, Mapping):
            inner = flatten(value, groups[name])
            found |= {f"{name}.{path}": v for path, v in inner.items()}
        else:
            found[name] = value
    return found


def replace(node: Any, values: Mapping[str, Any]) -> Any:
    """A copy with some fields changed: ``replace(config, {"train.steps": 6})``."""
    groups: dict[str, dict[str, Any]] = {}
    changes: dict[str, Any] = {}
    for path, value in values.items():
        group, dot, rest = path.partition(".")
        if dot:
            groups.setdefault(group, {})[rest] = value
        else:
            changes[path] = value
    changes |= {group: replace(getattr(node, group), inner) for group, inner in groups.items()}
    return dataclasses.replace(node, **changes)


def cast(value: Any, kind: Any) -> Any:
    """The value as its field's type: a JSON list as a tuple, 1 as 1.0.

    Raises:
      TypeError: it is of another type, or not among a Literal's values.
    """
    if get_origin(kind) is Literal:
        if isinstance(value, str) and value in get_args(kind):
            return value
    elif isinstance(kind, types.UnionType):
        return None if value is None else cast(value, get_args(kind)[0])
    elif get_origin(kind) is tuple:
        if isinstance(value, list | tuple):
            return tuple(cast(v, get_args(kind)[0]) for v in value)
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind:  # exactly: True is no integer here
        return value
    raise TypeError(f"expected {expected(kind)}; got {value!r}")


def expected(kind: Any) -> str:
    """What a field of this type takes, in words: ``expected(int)`` is ``"an integer"``."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if isinstance(kind, types.UnionType):
        return f"{expected(get_args(kind)[0])}, or None"
    if get_origin(kind) is tuple:
        element = get_args(kind)[0]
        return f"{'integers' if element is int else 'True or False'}, separated by spaces"
    return {int: "an integer", float: "a number", bool: "True or False", str: "text"}[kind]


def nearest_field(path: str, known: Iterable[str]) -> str:
    """The known paths that may have been meant, most likely first, as text; "" if none."""
    known = list(known)
    same_name = [k for k in known if k.rpartition(".")[2] == path]
    close = same_name or difflib.get_close_matches(path, known, n=1)
    if not close:  # the group may be missing and the name misspelt: "batchsize"
        names = {k.rpartition(".")[2]: k for k in known}
        close = [names[n] for n in difflib.get_close_matches(path, names, n=1)]
    return " or ".join(close)
