"""Values of a JSON file that somebody gives, checked when they are taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparseserve.checkpoint.json_file import read_json
from sparseserve.errors import RecipeError
from sparseserve.paths import shown_value


@dataclass(frozen=True, slots=True)
class JsonObject:
    """An object of a file.

    Attributes:
        where: The file.
        made_by: The command that writes such files.
        data: Its keys and values.
        place: Where in the file it is, for messages.
    """

    where: Path
    made_by: str
    data: Mapping[str, object]
    place: str = ""

    @classmethod
    def read(cls, where: Path, made_by: str) -> JsonObject:
        """Read a file.

        Raises:
            RecipeError: It is missing, or no JSON object.
        """
        return cls(where, made_by, read_json(where, RecipeError))

    def __contains__(self, key: str) -> bool:
        return self.data.get(key) is not None

    def text(self, key: str) -> str:
        """Return a text."""
        value = self.data.get(key)
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def number(self, key: str, *, above: float = -math.inf) -> float:
        """Return a finite number greater than ``above``."""
        value = self.data.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        if not above < value < math.inf:
            raise self._wrong(key, "a finite number" if above < 0 else f"above {above:g}")
        return float(value)

    def whole(self, key: str) -> int:
        """Return a whole number that is not negative."""
        value = self.data.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._wrong(key, "a whole number")
        return value

    def object(self, key: str) -> JsonObject:
        """Return an object."""
        value = self.data.get(key)
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return JsonObject(self.where, self.made_by, value, f"{self.place}{key}.")

    def objects(self, key: str) -> tuple[JsonObject, ...]:
        """Return a list of objects."""
        value = self.data.get(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._wrong(key, "a list of objects")
        return tuple(
            JsonObject(self.where, self.made_by, item, f"{self.place}{key}.{number}.")
            for number, item in enumerate(value)
        )

    def _wrong(self, key: str, wanted: str) -> RecipeError:
        found = shown_value(self.data[key]) if key in self.data else "missing"
        return RecipeError(
            f"{self.where}: {self.place}{key} is {found}, but must be {wanted}: give a file that "
            f"{self.made_by} wrote"
        )
