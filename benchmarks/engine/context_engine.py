"""An engine in this process that is stepped by hand, with contexts prefilled or only assumed.

An assumed context has its blocks and its token count, but was never computed: the pages hold the
random numbers that the pool was filled with. A decode step reads and writes the same pages whatever
is in them, so many long requests can decode together without hours of prefill. Where one request is
timed both ways, the two must agree.
"""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import dataclass
from typing import Any

import torch

from engine.stepped import SteppedEngine
from records import RefusalError, predict
from vllm_cascade.structure.config import CascadeConfig
from vllm_cascade.structure.layout import build_layout

# Steps after the first token that are not timed: the pipeline of an engine fills.
SETTLING = 4


@dataclass(frozen=True, slots=True)
class Run:
    """Requests that ran to their end.

    Args:
        first_token_s: Until every request had its first token.
        step_s: Mean seconds of a step in which every request got a token.
        blocks: Most blocks that were held at a time.
    """

    first_token_s: float
    step_s: float
    blocks: int


class Engine(SteppedEngine):
    """Steps an engine and reads its block pool.

    Args:
        llm: From vLLM, with `engine.serving.Probe` as its worker's extension.
        is_ours: Whether all layers must be the cascade's, or none.
    """

    def __init__(self, llm: Any, is_ours: bool) -> None:
        super().__init__(llm)
        self.llm, self.is_ours = llm, is_ours
        self.vllm_config = llm.llm_engine.vllm_config
        self.block_size = self.vllm_config.cache_config.block_size
        self.facts = self._probe(start=True)
        if bool(self.facts["layers"]) != is_ours:
            raise RefusalError(f"{self.facts['layers']} layers of the engine are the cascade's")
        self.config = CascadeConfig(**self.facts["config"]) if is_ours else None
        draw = random.Random(0)
        vocabulary = llm.model_config.get_vocab_size()
        longest = self.vllm_config.model_config.max_model_len
        self.tokens = [draw.randrange(2, vocabulary) for _ in range(longest)]
        self.requests = 0
        self._fill()

    def run(self, prompt: int, output: int, requests: int = 1, *, is_assumed: bool = False) -> Run:
        """Run equal requests to their end.

        Args:
            prompt: Tokens of each prompt.
            output: Tokens that each generates, more than `SETTLING` + 1.
            requests: How many.
            is_assumed: Whether all but the last token of each prompt counts as computed.

        Raises:
            RefusalError: Not all was done, or not at once, or the layers' counters show other work.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False
        )
        self._probe(start=True)
        self.preemptions, blocks = 0, 0
        tokens = self.tokens[:prompt]
        begin = time.perf_counter()
        for _ in range(requests):
            self.requests += 1
            self.llm.llm_engine.add_request(
                str(self.requests), {"prompt_token_ids": tokens}, sampling
            )
        if is_assumed:
            self._assume(prompt - 1)
        # Request -> tokens that it has got; when each had one token, two tokens, ...
        got: dict[str, int] = {}
        times: list[float] = []
        while self.llm.llm_engine.has_unfinished_requests():
            for found in self.llm.llm_engine.step():
                got[found.request_id] = len(found.outputs[0].token_ids)
            now = time.perf_counter() - begin
            blocks = max(blocks, self.held())
            if len(got) == requests:
                times += [now] * (min(got.values()) - len(times))
        if self.preemptions or set(got.values()) != {output} or len(got) != requests:
            raise RefusalError(
                f"{requests} requests of {prompt:,} tokens: {self.preemptions} preemptions, "
                f"generated {sorted(got.values())}"
            )
        if self.held():
            raise RefusalError(f"{self.held()} blocks are missing from the pool afterwards")
        self._check_counters((prompt - 1 if is_assumed else 0, prompt + output - 1), requests)
        steps = [after - before for before, after in itertools.pairwise(times[SETTLING:])]
        return Run(times[0], sum(steps) / len(steps), blocks)

    def _assume(self, computed: int) -> None:
        """Give all waiting requests the blocks of their first tokens, and count these as done."""
        for request in list(self.scheduler.waiting):
            if self.manager.allocate_slots(request, computed) is None:
                raise RefusalError(f"no blocks for another request of {computed:,} tokens")
            request.num_computed_tokens = computed

    def _fill(self) -> None:
        """Random numbers into every page: what memory happens to hold may be NaN, or all zeros."""
        with torch.inference_mode():
            for cache in self.runner.kv_caches:
                for part in cache.split(4096):
                    part.normal_()

    def _probe(self, *, start: bool) -> dict[str, Any]:
        if start:
            self.llm.collective_rpc("cascade_probe_start")
        (found,) = self.llm.collective_rpc("cascade_probe_read")
        return found

    def _check_counters(self, span: tuple[int, int], requests: int) -> None:
        """Compare what the cascade's layers counted with what the layout predicts."""
        if self.config is None:
            return
        found = self._probe(start=False)
        if not found["counters"]:
            if torch.cuda.is_available():
                raise RefusalError("the engine's layers have no device counters")
            return
        once = predict(build_layout(self.config), [span], found["num_kv_heads"])
        what = f"{requests} requests, tokens {span[0]:,} to {span[1]:,}"
        once.times(requests * found["layers"]).check(found["counters"], what)
