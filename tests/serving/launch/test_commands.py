"""``sparseserve serve`` as a user runs it, and commands that cannot be run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.serving.command import sparseserve

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "no/such/folder"), "no such folder"),
        (("bench", "no/such/folder", "--baseline", "neither"), "no such folder"),
    ],
)
def test_a_folder_that_is_not_there_is_one_line_and_exit_code_1(
    arguments: tuple[str, ...], message: str
) -> None:
    result = sparseserve(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_serve_answers_openai_requests(pair: tuple[Path, Path]) -> None:
    packed, dense = pair
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    server = subprocess.Popen(
        [
            # In bfloat16, which some processors would take, another token may be the likeliest.
            *(sys.executable, "-m", "sparseserve", "serve", str(packed), "--dtype", "float32"),
            *("--", "--host", "127.0.0.1", "--port", port, "--skip-tokenizer-init"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )
    try:
        assert server.stdout is not None
        log = []
        for line in server.stdout:
            log.append(line)
            if "Application startup complete" in line:
                break
        else:
            pytest.fail("".join(log[-30:]))
        wait_until_listening(server, port)
        prompt = list(range(10, 40))
        answer = complete(port, {"model": str(packed), "prompt": prompt, "max_tokens": 5})
    finally:
        server.terminate()
        server.communicate(timeout=60)
    model = AutoModelForCausalLM.from_pretrained(dense)
    ids = torch.tensor([prompt])
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert answer["choices"][0]["token_ids"] == ids[0, 30:].tolist()


def wait_until_listening(server: subprocess.Popen[str], port: str) -> None:
    """Cross the moment between the server's last line and its first open port."""
    while server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", int(port)), timeout=60).close()
        except ConnectionRefusedError:
            continue
        return
    pytest.fail(f"the server left with exit code {server.returncode}")


def complete(port: str, request: dict[str, Any]) -> dict[str, Any]:
    body = {**request, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with urllib.request.urlopen(
        urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        ),
        timeout=120,
    ) as response:
        answer: dict[str, Any] = json.loads(response.read())
        return answer
