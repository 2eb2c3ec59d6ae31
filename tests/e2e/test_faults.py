"""Finds alone: a client that waits, or a process that stays, when a worker is killed."""

from __future__ import annotations

import concurrent.futures
import json
import re
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import openai
import psutil
import pytest

from e2e.servers import Server, serve
from e2e.support import model_folder
from e2e.tiny import random_prompt, save_llama

pytestmark = pytest.mark.model

CASCADE = {
    "cache_tokens": 192,
    "num_sub_caches": 4,
    "num_sink_tokens": 16,
    "stride": 64,
    "selection_window": 64,
}
MAX_MODEL_LEN = 30_000
STREAMS = 3
EXIT_SECONDS = 60


class Client:
    """A client whose request would last for minutes.

    Args:
        server: Whom it asks.
        prompt_tokens: Length of its prompt.
        is_streaming: Whether it wants each token at once.
    """

    def __init__(self, server: Server, prompt_tokens: int, is_streaming: bool) -> None:
        self._server, self._is_streaming = server, is_streaming
        self._prompt = random_prompt(prompt_tokens, seed=prompt_tokens)
        self.heard = 0

    def ask(self) -> openai.APIError:
        """The error that ends the request."""
        try:
            answer = self._server.client().completions.create(
                model="llama",
                prompt=self._prompt,
                max_tokens=MAX_MODEL_LEN - len(self._prompt),
                stream=self._is_streaming,
                extra_body={"ignore_eos": True},
            )
            for _ in answer if self._is_streaming else ():
                self.heard += 1
        except openai.APIError as error:
            return error
        raise AssertionError("the request ended as if nothing had happened")


def wait_until(condition: Callable[[], bool], server: Server) -> None:
    """Wait for something that takes seconds."""
    deadline = time.monotonic() + EXIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, server.tail()
        time.sleep(0.05)


def running(server: Server) -> float:
    """Requests that the server's engine is working on."""
    text = urllib.request.urlopen(f"{server.address}/metrics", timeout=10).read().decode()
    return float(re.search(r"^vllm:num_requests_running{.*} (\S+)$", text, re.MULTILINE)[1])


def test_a_killed_worker_ends_every_request_and_the_server(tmp_path: Path) -> None:
    """Prefill and decode, streamed and not: an error each; no process is left behind."""
    model = save_llama(
        tmp_path / "llama", vocab_size=49_152, num_attention_heads=8, num_key_value_heads=4
    )
    flags = [
        "--served-model-name=llama",
        f"--tokenizer={model_folder()}",
        "--dtype=float32",
        "--tensor-parallel-size=2",
        "--distributed-executor-backend=mp",
        "--enforce-eager",
        "--block-size=16",
        f"--max-model-len={MAX_MODEL_LEN}",
        "--max-num-batched-tokens=256",
        f"--additional-config={json.dumps({'cascade': CASCADE})}",
    ]
    with serve(tmp_path, model, *flags, forked=True) as server:
        family = psutil.Process(server.process.pid).children(recursive=True)
        (worker,) = (process for process in family if "Worker_TP1" in process.cmdline()[0])
        decoding = [Client(server, 20 + i, is_streaming=True) for i in range(STREAMS)]
        decoding.append(Client(server, 300, is_streaming=False))
        prefilling = Client(server, MAX_MODEL_LEN - 100, is_streaming=True)
        with concurrent.futures.ThreadPoolExecutor(STREAMS + 2) as pool:
            try:
                asked = [pool.submit(client.ask) for client in decoding]
                wait_until(lambda: all(client.heard > 10 for client in decoding[:STREAMS]), server)
                asked.append(pool.submit(prefilling.ask))
                wait_until(lambda: running(server) == STREAMS + 2, server)
                worker.send_signal(signal.SIGKILL)
                errors = [each.result(EXIT_SECONDS) for each in asked]
            except BaseException:
                server.process.terminate()  # else its clients would keep the test waiting
                raise
        assert prefilling.heard == 0
        for error in errors:
            assert "EngineCore encountered an issue" in error.message, repr(error)
        assert errors[STREAMS].status_code == 500
        # vLLM's own status is 0; a signal would be a negative one.
        assert server.process.wait(EXIT_SECONDS) >= 0
        _, left = psutil.wait_procs(family, timeout=10)
        assert not left
        log = server.log.read_text()
        assert re.search(r"Worker proc \S+ died unexpectedly", log), log[-3000:]
