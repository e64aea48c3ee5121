"""A server that gets more than it can answer stays right; benchmarks/stress/loaded_server.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.stress.loaded_server import (
    REFUSED,
    RIGHT,
    TIE,
    WRONG,
    Reference,
    measure,
)
from benchmarks.stress.loaded_server_table import loaded_server_table


@pytest.mark.parametrize(
    ("said", "verdict"),
    [([5, 7], RIGHT), ([5, 8], TIE), ([6, 7], WRONG), ([5, 7, 7], WRONG), ([5], WRONG)],
)
def test_another_answer_is_right_only_where_two_tokens_were_as_likely(
    said: list[int], verdict: str
) -> None:
    assert Reference("At night:", (5, 7), (1.5, 0.001)).judged(said) == verdict


@pytest.mark.vllm
def test_a_loaded_server_answers_refuses_and_stays(
    two_four_folder: Callable[..., Path],
) -> None:
    folder = two_four_folder("llama")
    found = asyncio.run(measure(folder, minutes=0.15, count=24))
    endings: dict[str, set[str]] = {}
    for row in found["rows"]:
        endings.setdefault(row["kind"], set()).add(row["ending"])
    assert endings.pop("malformed") == endings.pop("far too long") == {REFUSED}
    assert endings.pop("hung up on") == {"hung up"}
    assert endings.keys() == {"ordinary", "read slowly"}
    assert set.union(*endings.values()) <= {RIGHT, TIE}
    setting = {"minutes": 0.15, "clients": 24, "sequences": 8, "folder": str(folder)}
    machine = {"cpu": "a processor", "torch": "2.13.0", "commit": "abc", "date": "today"}
    table = loaded_server_table({"setting": setting, "machine": machine, **found})
    assert len(table.splitlines()) == 2 + len(found["rows"]) + 2
