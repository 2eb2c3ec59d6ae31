"""Run prompts through a vLLM engine in a process of its own and read what that engine held."""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prepare_model import FOLDER

LOG_LINES = 30


@dataclass(frozen=True, slots=True)
class Completion:
    """What one prompt gave and took.

    Attributes:
        text: the generated text.
        token_ids: the generated tokens.
        num_prompt_tokens: length of the prompt.
        num_blocks: most KV blocks taken from the engine's pool at the end of any step.
        kv_bytes: bytes of those blocks, over all layers.
        prefill_s: seconds until the first generated token.
        total_s: seconds until the last one.
    """

    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_blocks: int
    kv_bytes: int
    prefill_s: float
    total_s: float


def complete(
    llm: Any, prompt: list[int], max_tokens: int, progress: Callable[[int], None]
) -> Completion:
    """Answer one prompt greedily, stepping the engine so that its block pool can be read.

    Args:
        llm: a `vllm.LLM` whose engine core lives in this process.
        prompt: token ids.
        max_tokens: tokens to generate; at least 2, since a finished request holds no block.
        progress: called after each step with how many tokens of the prompt are computed.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    idle, most, first_s = pool.get_num_free_blocks(), 0, None
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    start = time.perf_counter()
    engine.add_request("0", {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            latest, first_s = output.outputs[0], first_s or time.perf_counter() - start
        most = max(most, idle - pool.get_num_free_blocks())
        for request in scheduler.requests.values():
            progress(min(request.num_computed_tokens, len(prompt)))
    total_s = time.perf_counter() - start
    groups = scheduler.kv_cache_config.kv_cache_groups
    block_bytes = sum(g.kv_cache_spec.page_size_bytes * len(g.layer_names) for g in groups)
    return Completion(
        text=latest.text,
        token_ids=tuple(latest.token_ids),
        num_prompt_tokens=len(prompt),
        num_blocks=most,
        kv_bytes=most * block_bytes,
        prefill_s=first_s,
        total_s=total_s,
    )


def serve(options: dict[str, Any], log: str, pipe: Any) -> None:
    """Answer what comes through the pipe until it closes; the body of the engine's process."""
    # vLLM logs to both streams: they go to a file that is shown only if the process fails.
    with open(log, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    # The engine core stays in this process so that its block pool can be read between steps.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM

    # Prefix caching off: a prompt that begins like one before it would seem to cost nothing.
    fixed = {"max_num_seqs": 1, "enforce_eager": True, "enable_prefix_caching": False}
    llm = LLM(str(FOLDER), **fixed, **options)
    # The first step of an engine is slower than the rest.
    complete(llm, [1, 2, 3, 4], 2, lambda done: None)
    pipe.send("ready")
    while True:
        try:
            prompt, max_tokens = pipe.recv()
        except EOFError:
            return
        pipe.send(complete(llm, prompt, max_tokens, pipe.send))


class Engine:
    """A vLLM engine on the demo's model, one request at a time; a context manager.

    Args:
        options: keyword arguments for `vllm.LLM`.

    Raises:
        RuntimeError: from any method, when the engine's process has failed; the message ends with
            what it printed last.
    """

    def __init__(self, **options: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "engine.log"
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(options, str(self._log), theirs))
        self._process.start()
        theirs.close()
        self._receive()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise RuntimeError(f"the engine ended with {self._process.exitcode}:\n{tail}") from None

    def complete(
        self,
        prompt: list[int],
        max_tokens: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Completion:
        """Answer one prompt; see the function of the same name."""
        self._pipe.send((prompt, max_tokens))
        while not isinstance(message := self._receive(), Completion):
            progress(message)
        return message

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()
        self._folder.cleanup()
