"""Small damages to files: of bytes, of JSON values and of TOML lines, drawn from a seed."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Callable, Iterable
from typing import Any

#: What a value may become: other types, empty ones, and numbers that nothing has.
HOSTILE: tuple[object, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 2**16, 2**31, 2**32, 2**53, 2**63, 2**64, 10**40),
    *(0.5, -0.0, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", "x", "0", "dense", "../x", "/etc/passwd", "a/b", "\0", "\ud800", "é" * 300, "[red]x"),
    *([], {}, [[]], [None], [0, 0], ["x"], {"": 0}, {"a": {"b": []}}, "I8", "F64", "BF16", "F4"),
)
_WORDS = (b"\0", b"\xff", b"\n", b"{", b"}", b"[", b"]", b'"', b",", b"-", b"0", b"9" * 30, b"\\u")

Chance = random.Random
# An object or list of JSON data, and a key or index of it.
Place = tuple[Any, Any]


def mutated_bytes(data: bytes, chance: Chance) -> bytes:
    """Return ``data`` with one to four damages: flips, cuts, repeats, swaps and insertions."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        chance.choice(_DAMAGES)(changed, chance)
    return bytes(changed)


def mutated_json(value: object, chance: Chance) -> object:
    """Return a copy of JSON data with one to three values changed, removed, renamed or moved."""
    changed = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(changed))
        if places:
            _change(*chance.choice(places), places, chance)
    return changed


def mutated_text_of_json(value: object, chance: Chance) -> bytes:
    """Return the text of changed JSON data, and now and then damage that, too."""
    text = json.dumps(mutated_json(value, chance)).encode()
    return mutated_bytes(text, chance) if chance.random() < 0.15 else text


def mutated_toml(text: str, chance: Chance) -> bytes:
    """Return TOML with a value changed, a line moved, repeated or removed, or a byte damaged."""
    lines = text.splitlines()
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(lines))
        kind = chance.random()
        if kind < 0.6 and "=" in lines[place]:
            key = lines[place].partition("=")[0]
            lines[place] = f"{key}= {_toml(chance.choice(HOSTILE))}"
        elif kind < 0.7:
            lines.insert(chance.randrange(len(lines)), lines[place])
        elif kind < 0.8:
            lines.insert(0, lines.pop(place))
        else:
            lines[place] = mutated_bytes(lines[place].encode(), chance).decode(errors="ignore")
    whole = "\n".join(lines).encode(errors="ignore")
    return mutated_bytes(whole, chance) if chance.random() < 0.1 else whole


def _flip(data: bytearray, chance: Chance) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _cut(data: bytearray, chance: Chance) -> None:
    del data[chance.randrange(len(data) + 1) :]


def _remove(data: bytearray, chance: Chance) -> None:
    start = chance.randrange(len(data) + 1)
    del data[start : start + chance.randint(1, 8)]


def _insert(data: bytearray, chance: Chance) -> None:
    place = chance.randrange(len(data) + 1)
    data[place:place] = chance.choice(_WORDS)


def _repeat(data: bytearray, chance: Chance) -> None:
    start = chance.randrange(len(data) + 1)
    data[start:start] = data[start : start + chance.randint(1, 64)]


def _number(data: bytearray, chance: Chance) -> None:
    """Put another number in the place of one that is written in digits."""
    found = list(re.finditer(rb"\d+", data))
    if found:
        match = chance.choice(found)
        number = chance.choice((0, 1, 3, 8, 64, 2**31, 2**62, 2**64, int(match[0][:9]) + 1))
        data[match.start() : match.end()] = str(number).encode()


_DAMAGES: tuple[Callable[[bytearray, Chance], None], ...] = (
    *(_flip, _cut, _remove, _insert, _repeat, _number),
)


def _places(value: Any) -> list[Place]:
    """Return every object and list in JSON data with each of its keys, of long lists the first."""
    keys: Iterable[Any] = ()
    if isinstance(value, dict):
        keys = value
    elif isinstance(value, list):
        keys = range(min(len(value), 8))
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


def _change(holder: Any, key: Any, places: list[Place], chance: Chance) -> None:
    kind = chance.random()
    if kind < 0.55:
        holder[key] = _other(holder[key], chance)
    elif kind < 0.7:
        del holder[key]
    elif kind < 0.85 and isinstance(holder, dict):
        new = chance.choice((f"{key}x", str(key)[:-1], "format", "__metadata__", "a.weight"))
        holder[new] = holder[key]
    else:
        other, name = chance.choice(places)
        holder[key] = copy.deepcopy(other[name])


def _other(value: object, chance: Chance) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool) and chance.random() < 0.6:
        if not math.isfinite(value):
            return 0
        return chance.choice(
            (value + 1, value - 1, -value, 2 * value, value * 1000, int(value) * 10**6, str(value))
        )
    if isinstance(value, str) and value and chance.random() < 0.4:
        return mutated_bytes(value.encode(errors="ignore"), chance).decode(errors="ignore")
    return copy.deepcopy(chance.choice(HOSTILE))


def _toml(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, dict):
        return "{ a = 1 }"
    return json.dumps(value)
