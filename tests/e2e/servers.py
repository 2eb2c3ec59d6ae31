"""`vllm serve` in a process of its own, or in a fork."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai

from e2e.forks import Fork

START_SECONDS = 480
# Bytes of keys and values that are enough for models of `tiny.py`.
SMALL_POOL = 64 << 20


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers.

    Args:
        process: The command `vllm serve`.
        address: Its URL.
        log: What it prints.
    """

    process: subprocess.Popen | Fork
    address: str
    log: Path

    def tail(self) -> str:
        """The end of its log, to be shown where a test fails."""
        return self.log.read_text()[-3000:]

    def client(self) -> openai.OpenAI:
        """A client that tries once."""
        return openai.OpenAI(
            base_url=f"{self.address}/v1", api_key="none", timeout=300, max_retries=0
        )


@contextlib.contextmanager
def serve(folder: Path, model: str, *flags: str, forked: bool = False) -> Iterator[Server]:
    """Start a server on a free port and wait until it answers.

    Args:
        folder: For its log.
        model: Folder of the model.
        flags: Of `vllm serve`, beside `--attention-backend`.
        forked: Whether all its processes are forks, which import nothing and load no plugin; of a
            tiny model.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *("-m", "vllm.entrypoints.cli.main"),
        "serve",
        model,
        "--attention-backend=CASCADE",
        "--host=127.0.0.1",
        f"--port={port}",
        *flags,
    ]
    log = folder / "log"
    if forked:
        # The variable would overrule the option.
        environment = {k: v for k, v in os.environ.items() if k != "VLLM_CPU_KVCACHE_SPACE"}
        command.append(f"--kv-cache-memory-bytes={SMALL_POOL}")
        process: subprocess.Popen | Fork = Fork(command, log, environment)
    else:
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, *command], stdout=stream, stderr=subprocess.STDOUT
            )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"{server.address}/health"):
            assert process.poll() is None, server.tail()
            assert time.monotonic() < deadline, server.tail()
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    """Whether a URL is served without an error."""
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False
