from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from sparseserve.errors import RecipeError, ServingError
from sparseserve.serving.launch.child import first_error, last_words
from sparseserve.serving.measure.http_server import HttpServer
from sparseserve.serving.measure.load import Load, LoadLevel, LoadPlan
from sparseserve.serving.measure.load_run import measure_load

ONE_AT_A_TIME = LoadLevel(concurrency=1, request_rate=None)


@pytest.mark.parametrize(
    ("option", "plan"),
    [
        ("--http needs a level", {"levels": ()}),
        ("--requests 0", {"levels": (LoadLevel(None, 1.0),), "requests": 0}),
        ("--concurrency 0", {"levels": (LoadLevel(0, None),)}),
        (
            "--concurrency 8 .* number of requests, 4",
            {"levels": (LoadLevel(8, None),), "requests": 4},
        ),
        ("--request-rate 0", {"levels": (LoadLevel(None, 0.0),)}),
        ("--request-rate nan", {"levels": (LoadLevel(None, float("nan")),)}),
    ],
)
def test_a_plan_that_measures_nothing_is_refused(option: str, plan: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=option):
        LoadPlan(**plan)  # type: ignore[arg-type]


def test_a_server_has_room_for_all_that_can_be_under_way() -> None:
    levels = (LoadLevel(2, None), LoadLevel(8, None))
    assert LoadPlan(levels, requests=16).most_at_once == 8
    assert LoadPlan((*levels, LoadLevel(None, 0.5)), requests=16).most_at_once == 16


def test_levels_are_told_in_words() -> None:
    assert str(LoadLevel(4, None)) == "concurrency 4"
    assert str(LoadLevel(None, 0.5)) == "0.5 requests/s"


def test_the_clients_result_is_read_by_its_own_names() -> None:
    names = [f"{kind}_{name}_ms" for name in ("ttft", "tpot", "itl") for kind in ("median", "p99")]
    result = {"request_throughput": 1.0, "output_throughput": 2.0}
    found = Load.of({**result, **{name: 3.0 + number for number, name in enumerate(names)}})
    assert found == Load(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)


def test_of_processes_that_fell_one_after_another_the_first_error_is_the_cause(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    log.write_text(
        "ready\n(pid=1) ERROR x.py ValueError: too long\nlib.RuntimeError: core died\n\n"
    )
    with log.open() as lines:
        assert first_error(lines) == "ValueError: too long"
        assert last_words(lines) == "lib.RuntimeError: core died"
    log.write_text("\n")
    with log.open() as lines:
        assert first_error(lines) == "none"


class Refusing(BaseHTTPRequestHandler):
    """Has no endpoint at all."""

    def do_POST(self) -> None:
        self.send_error(418, "no tea either")

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


class RefusingServer:
    """Stands where a vLLM server would."""

    def __init__(self, port: int) -> None:
        self.folder, self.port = Path("refusing"), port

    def require_running(self) -> None:
        """It is."""


@pytest.mark.vllm
@pytest.mark.timeout(600)
class TestWithVllm:
    @pytest.fixture
    def folder(self, two_four_folder: Callable[..., Path]) -> Path:
        pytest.importorskip("vllm")
        return two_four_folder("llama")

    @pytest.fixture
    def refusing(self) -> Iterator[HttpServer]:
        with HTTPServer(("127.0.0.1", 0), Refusing) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield RefusingServer(server.server_port)  # type: ignore[misc]  # only its address counts
            server.shutdown()
            thread.join()

    def test_requests_that_fail_are_one_line_with_the_servers_reason(
        self, folder: Path, refusing: HttpServer
    ) -> None:
        plan = LoadPlan((ONE_AT_A_TIME,), (8,), 4, requests=2)
        with pytest.raises(
            ServingError, match=r"^refusing: .*2 of 2 requests failed: .*tea"
        ) as found:
            measure_load(refusing, refusing, folder, plan)
        assert "at concurrency 1, 8 tokens in" in str(found.value)
        assert len(str(found.value).splitlines()) == 1

    @pytest.mark.further
    def test_a_server_that_does_not_start_gives_its_reason_and_leaves_no_process(
        self, folder: Path
    ) -> None:
        server = HttpServer(folder, ("--no-such-option",))
        with pytest.raises(ServingError, match=r"exit code 2: .*no-such-option"), server:
            pytest.fail("it started")
        assert processes_with(str(server.port)) == 0

    def test_a_server_that_is_left_early_leaves_no_process(self, folder: Path) -> None:
        with contextlib.closing(HttpServer(folder, ())) as server:
            assert processes_with(str(server.port)) > 0
        assert processes_with(str(server.port)) == 0


def processes_with(argument: str) -> int:
    listing = subprocess.run(
        ["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True
    )
    return sum(argument in line.split() for line in listing.stdout.splitlines())
