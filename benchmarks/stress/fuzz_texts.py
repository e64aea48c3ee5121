"""Damaged recipes, and damaged texts of every ending."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset

from benchmarks.stress.fuzz_answers import WrongAnswerError
from benchmarks.stress.mutations import (
    Chance,
    mutated_bytes,
    mutated_json,
    mutated_text_of_json,
    mutated_toml,
)
from benchmarks.stress.plain_readings import plain_texts
from sparseserve.recipe.toml import (
    PRESETS,
    PUBLISHED_CORRECTIONS,
    load_recipe,
    named_recipe,
    recipe_from_mapping,
)
from sparseserve.testing import tiny_tokenizer
from sparseserve.text import evaluation_windows, read_text

_TEXT = "\n\n".join(f"Sentence {i} of {i * 7 % 31} words." for i in range(200))


def prepare_recipes(folder: Path) -> None:
    recipes = {**PRESETS, **{name: named_recipe("default", name) for name in PUBLISHED_CORRECTIONS}}
    for name, recipe in recipes.items():
        (folder / f"{name}.toml").write_text(_toml(recipe.to_json()))
        assert load_recipe(str(folder / f"{name}.toml")) == recipe


def _toml(data: Mapping[str, object]) -> str:
    plain = {key: value for key, value in data.items() if not isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items() if value is not None]
    for key, table in data.items():
        if isinstance(table, dict):
            lines += ["", f"[{key}]", _toml(table)]
    return "\n".join(lines)


def try_recipe(folder: Path, chance: Chance) -> None:
    source = chance.choice(sorted(folder.glob("*.toml")))
    path = folder / "input.recipe"
    path.write_bytes(mutated_toml(source.read_text(), chance))
    recipe = load_recipe(str(path))
    if recipe_from_mapping(json.loads(json.dumps(recipe.to_json()))) != recipe:
        raise WrongAnswerError(f"{recipe} does not come back from its JSON")


def prepare_texts(folder: Path) -> None:
    (folder / "a.txt").write_text(_TEXT)
    rows: list[dict[str, object]] = [
        {"text": f'Row {i}, "with" é.\nAnother line.', "n": i} for i in range(20)
    ]
    chats: list[dict[str, object]] = [
        {
            "messages": [
                {"role": "user", "content": f"How {i}?"},
                {"role": "assistant", "content": "So."},
            ]
        }
        for i in range(9)
    ]
    for name, table in (("rows", rows), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
        (folder / f"{name}.json").write_text(json.dumps(table))
        Dataset.from_list(table).to_parquet(folder / f"{name}.parquet")
    Dataset.from_list(rows).to_csv(folder / "rows.csv", index=False)


def try_text(folder: Path, chance: Chance) -> None:
    source = chance.choice(sorted(path for path in folder.iterdir() if path.stem != "input"))
    data = source.read_bytes()
    if source.suffix == ".json" and chance.random() < 0.7:
        data = mutated_text_of_json(json.loads(data), chance)
    elif source.suffix == ".jsonl" and chance.random() < 0.7:
        rows = [json.loads(line) for line in data.splitlines()]
        place = chance.randrange(len(rows))
        rows[place] = mutated_json(rows[place], chance)
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        data = mutated_bytes(data, chance)
    path = folder / f"input{source.suffix}"
    path.write_bytes(data)
    found = read_text(path)
    wanted = plain_texts(source.suffix, data)
    if wanted is not None and [_plain(document) for document in found.documents] != wanted:
        raise WrongAnswerError(f"{path.name}: other documents than its bytes hold")
    evaluation_windows(tiny_tokenizer(), found, sequence_length=8, samples=2)


def _plain(document: object) -> object:
    return document if isinstance(document, str) else json.loads(str(document))
