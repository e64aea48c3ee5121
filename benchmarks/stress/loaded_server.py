"""Does a server that gets more than it can answer stay right, and as large as it was?

vLLM serves a checkpoint as ``sparseserve serve`` would, and many clients send all that they can for
as long as is said. A part of the requests is ordinary, a part is read slowly, a part is hung up on,
a part is malformed, and a part is far too long. Ordinary answers are compared with what the server
said to the same prompt when it was alone. Its memory is asked for every few seconds. ::

    python -m benchmarks.stress.loaded_server demo/smollm2-135m-2of4 --minutes 60
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import click
import psutil

from benchmarks.harness.results import RESULTS, write_result
from sparseserve.huggingface.opening import open_tokenizer
from sparseserve.serving.launch.command import LOCAL_HOST
from sparseserve.serving.launch.served_model import ServedModel
from sparseserve.serving.measure.http_server import HttpServer
from sparseserve.text import read_text

_RESULT = "loaded-server.json"
_PROMPTS = 24
_PROMPT_TOKENS = 48
_NEW_TOKENS = 16
_LENGTH = 512
_SEQUENCES = 8  # that the server answers at once
_PATIENCE = 1800.0  # seconds
_SLOWLY = 0.2  # seconds between two reads
_MEMORY_SECONDS = 5.0
# Two tokens that are this near are as likely as each other: sums of another batch may turn them.
_TIE = 1e-2

RIGHT, TIE, WRONG = "right", "right but for a tie", "wrong"
REFUSED, HUNG_UP, FAILED = "refused", "hung up", "failed"


@dataclass(frozen=True, slots=True)
class Reference:
    """What the server says to a prompt when it is alone.

    Attributes:
        prompt: The text.
        tokens: Ids of what it says.
        gaps: By how much each of them is likelier than the next best one, in nats.
    """

    prompt: str
    tokens: tuple[int, ...]
    gaps: tuple[float, ...]

    def judged(self, said: Sequence[int]) -> str:
        """Say whether ``said`` is that answer."""
        if len(said) != len(self.tokens):
            return WRONG
        for token, own, gap in zip(said, self.tokens, self.gaps, strict=True):
            if token != own:
                return TIE if gap < _TIE else WRONG
        return RIGHT


@dataclass(slots=True)
class Found:
    """What became of the requests, by kind; memory in bytes; the longest answer in seconds."""

    endings: Counter[tuple[str, str]] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    longest: float = 0.0


class Clients:
    """Sends requests of all kinds."""

    def __init__(
        self, session: aiohttp.ClientSession, server: str, model: str, too_long: str
    ) -> None:
        self._session, self._url, self._model = session, f"{server}/v1/completions", model
        self._too_long = too_long
        self.references: tuple[Reference, ...] = ()

    async def reference(self, prompt: str) -> Reference:
        """Ask alone."""
        # By ids: several tokens may read alike.
        body = self._body(prompt, logprobs=2, return_tokens_as_token_ids=True)
        async with self._session.post(self._url, json=body) as reply:
            choice = (await reply.json())["choices"][0]
        gaps = []
        for best in choice["logprobs"]["top_logprobs"]:
            first, second = sorted(best.values(), reverse=True)[:2]
            gaps.append(first - second)
        return Reference(prompt, tuple(choice["token_ids"]), tuple(gaps))

    async def ordinary(self, chance: random.Random) -> str:
        """Ask and compare."""
        asked = chance.choice(self.references)
        async with self._session.post(self._url, json=self._body(asked.prompt)) as reply:
            if reply.status != 200:
                return FAILED
            return asked.judged((await reply.json())["choices"][0]["token_ids"])

    async def read_slowly(self, chance: random.Random) -> str:
        """Ask for a stream, wait between reads, and compare."""
        asked, said = chance.choice(self.references), list[int]()
        body = self._body(asked.prompt, stream=True)
        async with self._session.post(self._url, json=body) as reply:
            async for row in reply.content:
                text = row.decode().removeprefix("data:").strip()
                if text and text != "[DONE]":
                    said += json.loads(text)["choices"][0]["token_ids"]
                    await asyncio.sleep(_SLOWLY)
        return asked.judged(said)

    async def hung_up_on(self, chance: random.Random) -> str:
        """Leave after a part of a stream, or before it begins."""
        body = self._body(chance.choice(self.references).prompt, stream=True)
        async with self._session.post(self._url, json=body) as reply:
            if chance.random() < 0.5:
                await reply.content.readany()
        return HUNG_UP

    async def malformed(self, chance: random.Random) -> str:
        """Send what no server can answer."""
        good = self._body("A")
        bodies = (
            json.dumps(good)[:-3],
            json.dumps({**good, "max_tokens": -1}),
            json.dumps({**good, "temperature": "warm"}),
            json.dumps({**good, "model": "another"}),
            json.dumps({**good, "prompt": [[-5, 2**40]]}),
            json.dumps([good]),
            "\0" * chance.randrange(1, 4096),
        )
        return await self._refused(chance.choice(bodies))

    async def far_too_long(self, chance: random.Random) -> str:
        """Send a prompt that is several times as long as the model takes."""
        return await self._refused(json.dumps(self._body(self._too_long)))

    async def _refused(self, body: str) -> str:
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self._url, data=body, headers=headers) as reply:
            await reply.read()
            return REFUSED if 400 <= reply.status < 500 else f"{FAILED} ({reply.status})"

    def _body(self, prompt: str, **more: object) -> dict[str, object]:
        greedy = {"max_tokens": _NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        asked = {"model": self._model, "prompt": prompt, "return_token_ids": True}
        return {**asked, **greedy, **more}


Send = Callable[[random.Random], Awaitable[str]]


async def loaded(
    clients: Clients, prompts: Sequence[str], minutes: float, count: int
) -> tuple[Found, tuple[float, float]]:
    """Put the load on the server; return what was found, and a lone answer's time around it.

    Args:
        clients: Of the server.
        prompts: Of ordinary requests.
        minutes: How long to send.
        count: Requests under way at once.
    """
    clients.references = tuple([await clients.reference(prompt) for prompt in prompts])
    before = await _lone_seconds(clients)
    # Ordinary requests are twice as frequent as each of the others.
    kinds: tuple[tuple[str, Send], ...] = (
        *[("ordinary", clients.ordinary)] * 2,
        ("read slowly", clients.read_slowly),
        ("hung up on", clients.hung_up_on),
        ("malformed", clients.malformed),
        ("far too long", clients.far_too_long),
    )
    found, end = Found(), time.monotonic() + 60 * minutes
    watching = asyncio.create_task(_watch_memory(found))
    await asyncio.gather(*(_send(found, kinds, end, seed) for seed in range(count)))
    after = await _lone_seconds(clients)
    watching.cancel()
    return found, (before, after)


async def _send(found: Found, kinds: Sequence[tuple[str, Send]], end: float, seed: int) -> None:
    chance = random.Random(seed)
    while time.monotonic() < end:
        kind, send = chance.choice(kinds)
        started = time.monotonic()
        try:
            ending = await asyncio.wait_for(send(chance), _PATIENCE)
        except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
            ending = f"{FAILED} ({type(error).__name__})"
        found.longest = max(found.longest, time.monotonic() - started)
        found.endings[kind, ending] += 1


async def _watch_memory(found: Found) -> None:
    while True:
        found.memory.append(_memory_of_children())
        await asyncio.sleep(_MEMORY_SECONDS)


def _memory_of_children() -> int:
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


async def _lone_seconds(clients: Clients) -> float:
    started = time.monotonic()
    await clients.reference(clients.references[0].prompt)
    return time.monotonic() - started


async def measure(folder: Path, minutes: float, count: int) -> dict[str, Any]:
    """Serve ``folder``, put the load on it, and return what was found as JSON data."""
    tokenizer = open_tokenizer(folder)
    text = "\n\n".join(map(str, read_text(None, packaged="evaluation").documents))
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    prompts = [
        str(tokenizer.decode(tokens[start : start + _PROMPT_TOKENS]))
        for start in range(0, _PROMPTS * _PROMPT_TOKENS, _PROMPT_TOKENS)
    ]
    length = min(_LENGTH, ServedModel.open(folder).max_positions or _LENGTH)
    options = (
        *("--dtype", "float32", "--max-model-len", str(length)),
        *("--max-num-seqs", str(_SEQUENCES), "--no-enable-prefix-caching"),
    )
    with HttpServer(folder, options) as server:
        limits = aiohttp.TCPConnector(limit=0)
        patience = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=limits, timeout=patience) as session:
            clients = Clients(
                session,
                f"http://{LOCAL_HOST}:{server.port}",
                str(folder),
                str(tokenizer.decode(tokens[: 4 * length])),
            )
            found, (before, after) = await loaded(clients, prompts, minutes, count)
        server.require_running()
    rows = [
        {"kind": kind, "ending": ending, "requests": requests}
        for (kind, ending), requests in sorted(found.endings.items())
    ]
    # What is allocated with the first requests is no growth.
    settled = len(found.memory) // 10
    memory = {
        "start": found.memory[settled],
        "peak": max(found.memory[settled:]),
        "end": found.memory[-1],
    }
    return {
        "rows": rows,
        "memory_bytes": memory,
        "longest_seconds": found.longest,
        "lone_seconds": {"before": before, "after": after},
    }


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--minutes", default=60.0, show_default=True)
@click.option("--clients", default=64, show_default=True, help="Requests under way at once.")
@click.option("--result", default=_RESULT, show_default=True, help="Name of the JSON.")
def main(folder: Path, minutes: float, clients: int, result: str) -> None:
    """Serve FOLDER and put more load on it than it can answer."""
    setting = {
        "folder": str(folder),
        "minutes": minutes,
        "clients": clients,
        "sequences": _SEQUENCES,
    }
    found = asyncio.run(measure(folder, minutes, clients))
    write_result(RESULTS / result, setting, **found)


if __name__ == "__main__":
    main()
