"""A vLLM engine in a process of its own, which also tells how many blocks its requests held."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_cascade.commands.errors import CommandError
from vllm_cascade.support.names import BACKEND_NAME

LOG_LINES = 30
# No prefix caching: with it a prompt that begins like an earlier one would seem to cost nothing.
FIXED = {"enable_prefix_caching": False, "skip_tokenizer_init": True}
KEPT_TOKENS = "kept_tokens"  # sent to the engine's process in the place of requests


class EngineError(RuntimeError):
    """The engine's process failed; the message ends with the last lines that it printed."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request to the engine.

    Attributes:
        token_ids: The prompt.
        max_tokens: Tokens to generate, greedily and past an end token. At least 2: a request that
            ends with its first token holds no block after any step, so none would be counted.
        logprobs: Whether to return the prompt's log-probabilities.
    """

    token_ids: list[int]
    max_tokens: int
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one request, and what the request cost.

    Attributes:
        token_ids: The generated tokens.
        num_prompt_tokens: Length of the prompt in tokens.
        logprobs: Log-probabilities of the prompt's tokens but the first, in nats; empty unless
            asked for.
        num_blocks: Most KV blocks that the request held at the end of any step, over all groups
            of layers.
        kv_bytes: Bytes of these blocks, over all layers.
        prefill_s: Seconds from the batch's start until the request's first generated token.
        total_s: Seconds from the batch's start until the request's last token.
    """

    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    logprobs: tuple[float, ...]
    num_blocks: int
    kv_bytes: int
    prefill_s: float
    total_s: float


Progress = Callable[[int, int], None]


class _Batch:
    """Requests that run together in an engine whose core lives in this process."""

    def __init__(self, llm: Any, requests: Sequence[Request]) -> None:
        self.engine = llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.requests = requests
        self.computed = [0] * len(requests)
        self.held: list[tuple[int, int]] = [(0, 0)] * len(requests)
        self.first_s = [0.0] * len(requests)
        groups = self.scheduler.kv_cache_config.kv_cache_groups
        self.block_bytes = [g.kv_cache_spec.page_size_bytes * len(g.layer_names) for g in groups]

    def run(self, progress: Progress) -> list[Completion]:
        """Answer all requests.

        Args:
            progress: Called after each step with the number of prompt tokens computed and of
                requests finished so far.

        Returns:
            The completions, in the order of the requests.
        """
        from vllm import SamplingParams

        start = time.perf_counter()
        for number, request in enumerate(self.requests):
            params = SamplingParams(
                temperature=0.0,
                max_tokens=request.max_tokens,
                ignore_eos=True,
                detokenize=False,
                prompt_logprobs=0 if request.logprobs else None,
                flat_logprobs=True,
            )
            prompt = {"prompt_token_ids": request.token_ids}
            self.engine.add_request(str(number), prompt, params)
        done: dict[int, Completion] = {}
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            seconds = time.perf_counter() - start
            self._watch()
            for output in outputs:
                number = int(output.request_id)
                self.first_s[number] = self.first_s[number] or seconds
                if output.finished:
                    done[number] = self._completion(number, output, seconds)
                    self.computed[number] = len(self.requests[number].token_ids)
            progress(sum(self.computed), len(done))
        return [done[number] for number in range(len(self.requests))]

    def _watch(self) -> None:
        for running in self.scheduler.running:
            # vLLM appends a random suffix to the ids inside the engine.
            number = int(running.request_id.partition("-")[0])
            computed = min(running.num_computed_tokens, len(self.requests[number].token_ids))
            self.computed[number] = max(self.computed[number], computed)
            groups = self.scheduler.kv_cache_manager.get_block_ids(running.request_id)
            sizes = [len(group) for group in groups]
            num_bytes = sum(n * b for n, b in zip(sizes, self.block_bytes, strict=True))
            self.held[number] = max(self.held[number], (sum(sizes), num_bytes))

    def _completion(self, number: int, output: Any, seconds: float) -> Completion:
        request, num_blocks = self.requests[number], self.held[number]
        logprobs: tuple[float, ...] = ()
        if request.logprobs:
            flat = output.prompt_logprobs
            spans = zip(flat.start_indices, flat.end_indices, strict=True)
            logprobs = tuple(flat.logprobs[start] for start, end in spans if end > start)
            if len(logprobs) != len(request.token_ids) - 1:
                raise RuntimeError(
                    f"{len(logprobs)} log-probabilities of {len(request.token_ids)} tokens"
                )
        return Completion(
            token_ids=tuple(output.outputs[0].token_ids),
            num_prompt_tokens=len(request.token_ids),
            logprobs=logprobs,
            num_blocks=num_blocks[0],
            kv_bytes=num_blocks[1],
            prefill_s=self.first_s[number],
            total_s=seconds,
        )


def serve(model: str, options: dict[str, Any], log: str, pipe: Any) -> None:
    """Answer what comes through the pipe until the pipe closes; the body of the engine's process.

    Args:
        model: As for `vllm.LLM`.
        options: Keyword arguments for `vllm.LLM`.
        log: File that takes what the process prints.
        pipe: This process's end of the pipe.
    """
    # vLLM logs to both streams. The file is shown only if the process fails.
    with open(log, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    # The engine core stays in this process, so that the block pool can be read between steps.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM

    llm = LLM(model, **FIXED, **options)
    # A request that nobody times: an engine's first step is slower than the others.
    _Batch(llm, [Request([1, 2, 3, 4], 2)]).run(lambda computed, finished: None)
    pipe.send("ready")
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        if asked == KEPT_TOKENS:
            pipe.send(llm.collective_rpc(KEPT_TOKENS))
            continue
        pipe.send(_Batch(llm, asked).run(lambda *done: pipe.send(done)))


class Engine:
    """A vLLM engine in a process of its own, which gives all memory back; a context manager.

    Args:
        model: As for `vllm.LLM`.
        options: Keyword arguments for `vllm.LLM`.

    Raises:
        EngineError: The process failed; any method raises this error.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "engine.log"
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (model, options, str(self._log), theirs)
        self._process = context.Process(target=serve, args=arguments)
        self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def run(
        self,
        requests: Sequence[Request],
        progress: Progress = lambda computed, finished: None,
    ) -> list[Completion]:
        """Answer requests, which vLLM batches as it sees fit.

        Args:
            requests: The requests; the engine gets all of them at once.
            progress: Called after each step with the number of prompt tokens computed and of
                requests finished so far.

        Returns:
            The completions, in the order of the requests.
        """
        self._pipe.send(list(requests))
        while not isinstance(message := self._receive(), list):
            progress(*message)
        return message

    def kept_tokens(self) -> list[list[dict[str, Any]]]:
        """Read the kept tokens of each rank, as `trace.WorkerExtension.kept_tokens` gives them."""
        self._pipe.send(KEPT_TOKENS)
        kept: list[list[dict[str, Any]]] = self._receive()
        return kept

    def close(self) -> None:
        """End the process, which gives its memory back."""
        self._pipe.close()
        self._process.join()
        self._folder.cleanup()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise EngineError(f"the engine ended with {self._process.exitcode}:\n{tail}") from None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def resolve(model: str, options: dict[str, Any]) -> tuple[int, Any]:
    """Check an engine's options as vLLM would, without starting the engine.

    Args:
        model: As for `vllm.LLM`.
        options: Keyword arguments for `vllm.LLM`.

    Returns:
        The positions that the backend may give to the model's keys, and the `CascadeConfig` (None
        for another backend).

    Raises:
        CommandError: vLLM or the plugin refuses; the message has their own words.
    """
    # Standard output stays free: vLLM warns here of much that the engine's process says again.
    with contextlib.redirect_stdout(sys.stderr):
        from vllm_cascade.commands.offline import engine_config
        from vllm_cascade.support.resolved import position_limit, resolve_options, rotary_limit

        try:
            vllm_config = engine_config(model=model, **FIXED, **options)
        except OSError as error:
            raise CommandError(str(error)) from error
        if options.get("attention_backend") != BACKEND_NAME:
            return rotary_limit(vllm_config.model_config), None
        return position_limit(vllm_config.model_config), resolve_options(vllm_config)
