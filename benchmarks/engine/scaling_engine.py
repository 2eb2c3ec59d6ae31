"""An engine of any number of ranks that is asked as a server asks it, and timed from outside."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import Any

from records import RefusalError, predict
from vllm_cascade.commands.plan import Plan

# Fewest tokens of each request while all decode.
FEWEST = 32


@dataclass(frozen=True, slots=True)
class Grid:
    """How an engine is spread.

    Args:
        tensor: Ranks that share a layer's heads.
        pipeline: Stages that share the layers.
        replicas: Engines that share the requests.
        executor: Of vLLM, or None for its choice. Replicas are started by Ray if it is Ray's.
    """

    tensor: int = 1
    pipeline: int = 1
    replicas: int = 1
    executor: str | None = None

    @property
    def gpus(self) -> int:
        """GPUs that it takes."""
        return self.tensor * self.pipeline * self.replicas

    def options(self) -> dict[str, Any]:
        """For vLLM's engine arguments."""
        ray = {"data_parallel_backend": "ray"} if self.executor == "ray" else {}
        return {
            **(ray if self.replicas > 1 else {}),
            "tensor_parallel_size": self.tensor,
            "pipeline_parallel_size": self.pipeline,
            "data_parallel_size": self.replicas,
            "distributed_executor_backend": self.executor,
        }


@dataclass(frozen=True, slots=True)
class Sizes:
    """What runs.

    Args:
        model: The model's configuration.
        prompt: Tokens of a long prompt, past the budget.
        requests: Requests that decode together in each replica.
        margin: Steps that all of them decode for, if no step is lost.
        cascade: Options of the cascade.
        engine: Options of the engine.
        long: Tokens of a longer prompt whose first token is waited for too; 0 for none.
        backend: Attention backend of the engine.
    """

    model: dict[str, Any]
    prompt: int
    requests: int
    margin: int
    cascade: dict[str, Any]
    engine: dict[str, Any]
    long: int = 0
    backend: str = "CASCADE"

    def full_cache(self, plan: Plan) -> int:
        """Tokens of a prompt that fills sinks and sub-caches and one stride more."""
        config = plan.config
        return config.num_sink_tokens + config.cache_tokens + config.stride

    def output(self, plan: Plan) -> int:
        """Tokens to generate so that the first request still decodes when the last begins."""
        prefilled = self.requests * self.full_cache(plan)
        return -(-prefilled // self.engine["max_num_batched_tokens"]) + self.requests + self.margin

    def total(self, plan: Plan) -> int:
        """Tokens that are prefilled in all by a replica."""
        return self.requests * self.full_cache(plan) + 4 * self.prompt + self.long


class Engine:
    """An engine behind `AsyncLLM`, asked from one event loop.

    Args:
        llm: From vLLM, with `engine.serving.Probe` as its workers' extension.
        sizes: What runs.
        grid: How it is spread.
        plan: The cascade's configuration.
    """

    def __init__(self, llm: Any, sizes: Sizes, grid: Grid, plan: Plan) -> None:
        self.llm, self.sizes, self.grid, self.plan = llm, sizes, grid, plan
        self.draw, self.number = random.Random(0), 0

    async def rpc(self, method: str) -> list[dict[str, Any]]:
        """What a method of the probe returns on each rank of each replica."""
        core = self.llm.engine_core
        if self.grid.replicas == 1:
            return await core.collective_rpc_async(method)
        # `collective_rpc` of replicas returns the first one's answers only.
        found = await core.call_utility_all_async("collective_rpc", method, None, (), None)
        return [rank for ranks in found for rank in ranks]

    async def one(self, prompt: int, output: int, number: int) -> list[float]:
        """When a request got each of its tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=output,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        tokens = self.draw.choices(range(2, self.sizes.model["vocab_size"]), k=prompt)
        replica = number % self.grid.replicas if self.grid.replicas > 1 else None
        times: list[float] = []
        async for found in self.llm.generate(
            {"prompt_token_ids": tokens}, sampling, str(number), data_parallel_rank=replica
        ):
            now = time.perf_counter()
            times += [now] * len(found.outputs[0].token_ids)
        return times

    async def run(self, prompt: int, output: int, requests: int) -> tuple[float, list[list[float]]]:
        """Run equal requests at once.

        Returns:
            When they were sent, and for each when it got each of its tokens, in seconds.

        Raises:
            RefusalError: Not all was generated, or the ranks' counters show other work.
        """
        await self.rpc("cascade_probe_start")
        begin = time.perf_counter()
        numbers = range(self.number, self.number + requests)
        self.number += requests
        times = await asyncio.gather(*(self.one(prompt, output, number) for number in numbers))
        got = sorted({len(each) for each in times})
        if got != [output]:
            raise RefusalError(f"requests generated {got} tokens, not {output}")
        self.check(await self.rpc("cascade_probe_read"), prompt + output - 1, requests)
        return begin, times

    def check(self, ranks: list[dict[str, Any]], computed: int, requests: int) -> None:
        """Compare what all ranks counted together with what the layout predicts."""
        import torch

        from vllm_cascade.structure.config import CascadeConfig
        from vllm_cascade.structure.layout import build_layout

        layers, heads = (
            self.sizes.model[name] for name in ("num_hidden_layers", "num_key_value_heads")
        )
        # Ranks beyond the KV heads hold copies.
        heads = max(heads, self.grid.tensor)
        held = sum(rank["layers"] * rank["num_kv_heads"] for rank in ranks)
        expected = layers * heads * self.grid.replicas if self.sizes.backend == "CASCADE" else 0
        if len(ranks) != self.grid.gpus or held != expected:
            raise RefusalError(f"{len(ranks)} ranks hold {held} KV heads of all layers")
        if not expected:
            return
        for rank in ranks:
            if CascadeConfig(**rank["config"]) != self.plan.config:
                raise RefusalError(f"a rank has {rank['config']}, planned {self.plan.config}")
        if not torch.cuda.is_available():
            return
        predicted = predict(build_layout(self.plan.config), [(0, computed)], heads)
        counted = [sum(rank["counters"][i] for rank in ranks) for i in range(3)]
        what = f"{requests} requests of {computed:,} tokens on {len(ranks)} ranks"
        predicted.times(layers * requests).check(counted, what)

    async def measure(self) -> dict[str, Any]:
        """The figures of a row.

        Raises:
            RefusalError: See the module.
        """
        sizes = self.sizes
        # Kernels are compiled and loaded in each replica.
        await self.run(sizes.prompt, 4, self.grid.replicas)
        begin, ((first, *_),) = await self.run(sizes.prompt, 1, 1)
        alone = first - begin
        number = 2 * self.grid.replicas
        begin, times = await self.run(sizes.prompt, 1, number)
        prefill = number * sizes.prompt / (max(each[0] for each in times) - begin)
        print(f"  one prompt {alone:.2f} s, {number} {prefill:,.0f} tokens/s")
        long = {}
        if sizes.long:
            begin, ((first, *_),) = await self.run(sizes.long, 1, 1)
            long = {"long_tokens": sizes.long, "long_ttft_s": round(first - begin, 3)}
            print(f"  a prompt of {sizes.long:,} tokens {first - begin:.2f} s")
        prompt, output = sizes.full_cache(self.plan), sizes.output(self.plan)
        requests = sizes.requests * self.grid.replicas
        _, times = await self.run(prompt, output, requests)
        since, until = max(each[0] for each in times), min(each[-1] for each in times)
        decoded = [sum(since < moment <= until for moment in each) for each in times]
        if min(decoded) < FEWEST:
            raise RefusalError(f"all decoded together for {min(decoded)} tokens, not {FEWEST}")
        decode = sum(decoded) / (until - since)
        print(f"  {requests} requests at once, {decode:,.0f} tokens/s")
        (mode,) = {rank["cudagraph_mode"] for rank in await self.rpc("cascade_probe_read")}
        return {
            "prompt_tokens": sizes.prompt,
            "ttft_s": round(alone, 3),
            "prefill_tokens_per_s": round(prefill, 1),
            "decode_requests": requests,
            "decode_context": prompt,
            "decode_tokens_each": min(decoded),
            "decode_tokens_per_s": round(decode, 1),
            "cudagraph_mode": mode,
            "cascade": self.plan.config.summary() if sizes.backend == "CASCADE" else "",
            "backend": sizes.backend,
            "cache_tokens": self.plan.config.cache_tokens,
            "long_tokens": 0,
            "long_ttft_s": "",
            **long,
        }
