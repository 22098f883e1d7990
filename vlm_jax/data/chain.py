"""How a chain of operations is read: "resize(64)|flip(p=0.5)"."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.errors import nearest


def parse_value(text: str) -> Any:
    """"3" -> 3, "0.5" -> 0.5, "0.8..1" -> (0.8, 1.0), anything else -> itself."""
    text = text.strip()
    low, dots, high = text.partition("..")
    if dots:
        return float(low), float(high)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def parse_chain(text: str, table: Mapping[str, Callable], skip: int, defaults: Mapping[str, Any]) -> list:
    """Reads "name(a, key=b)|name" into [(name, function, arguments)].

    A function's parameters after the first ``skip`` are its declared arguments; those missing from
    the text are taken from ``defaults`` where it has them. Raises ValueError naming the nearest
    valid operation or argument.
    """
    calls = []
    for part in filter(None, (p.strip() for p in text.split("|"))):
        match = re.fullmatch(r"(\w+)\s*(?:\((.*)\))?", part)
        name = match.group(1) if match else part
        if name not in table:
            raise ValueError(f"{name!r} in {text!r} is not an operation{nearest(name, table)}")
        declared = list(inspect.signature(table[name]).parameters.values())[skip:]
        names, given = [p.name for p in declared], {}
        for i, item in enumerate(filter(None, (a.strip() for a in (match.group(2) or "").split(",")))):
            key, equals, value = item.partition("=")
            if not equals:
                if i >= len(names):
                    raise ValueError(f"{name} takes {len(names)} arguments ({', '.join(names)}), {part!r} gives more")
                key, value = names[i], item
            key = key.strip()
            if key not in names:
                raise ValueError(f"{key!r} in {part!r} is not an argument of {name}{nearest(key, names)}")
            if key in given:
                raise ValueError(f"{key!r} is given twice in {part!r}")
            given[key] = parse_value(value)
        for parameter in declared:
            if parameter.name not in given and parameter.name in defaults:
                given[parameter.name] = defaults[parameter.name]
            if parameter.name not in given and parameter.default is parameter.empty:
                raise ValueError(f"{part!r} lacks the argument {parameter.name!r} of {name}")
        calls.append((name, table[name], given))
    return calls
