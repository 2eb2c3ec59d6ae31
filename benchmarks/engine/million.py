"""A request of a million tokens, and many that hold a full cache, in the memory that is predicted.

A model of Llama-3.1-8B's shape with dummy weights and `--max-model-len 1048576`, other options of
the cascade as they are by default. Two rows: 24 requests of 24,000 tokens that decode together, and
one request of 1,000,000 tokens. Blocks are read from the pool while the engine is stepped.

A row is not reported if a request was preempted, held more blocks than the structure's most, did
not come to an end, or if blocks are missing from the pool afterwards.

    python benchmarks engine.million            writes benchmarks/results/gpu_million.csv
    python benchmarks engine.million --tiny     proves the program on a CPU, nothing written
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.models import LLAMA, TINY_LLAMA, plan_of
from engine.serving import cascade_impls
from engine.stepped import SteppedEngine
from records import RESULTS, RefusalError, conditions, in_words, write_rows
from vllm_cascade.commands.plan import Plan

OUTPUT = RESULTS / "gpu_million.csv"
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """A row.

    Args:
        requests: Requests at once.
        prompt_tokens: Tokens of each prompt.
        output_tokens: Tokens that each generates.
    """

    requests: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """What runs.

    Args:
        model: The model's configuration.
        cases: Name to row.
        cascade: Options of the cascade.
        engine: Options of the engine.
    """

    model: dict[str, Any]
    cases: dict[str, Case]
    cascade: dict[str, Any]
    engine: dict[str, Any]


FULL = Sizes(
    model=LLAMA,
    # Prompts are prefilled one after the other: the first still decodes when the last begins.
    cases={"24_full_caches": Case(24, 24_000, 256), "million": Case(1, 1_000_000, 16)},
    cascade={},
    engine={
        "dtype": "bfloat16",
        "max_model_len": 1 << 20,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 16_384,
        "gpu_memory_utilization": 0.9,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 8, 16, 24, 32],
        },
    },
)
TINY = Sizes(
    model=TINY_LLAMA,
    cases={"24_full_caches": Case(4, 500, 40), "million": Case(1, 3_000, 4)},
    cascade={
        "cache_tokens": 256,
        "num_sub_caches": 4,
        "newest_share": 0.0,
        "num_sink_tokens": 32,
        "stride": 128,
        "selection_window": 64,
    },
    engine={
        "dtype": "float32",
        "max_model_len": 4_096,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 512,
        "block_size": 32,
        "enforce_eager": True,
    },
)


class Engine(SteppedEngine):
    """An engine in this process, stepped by hand.

    Args:
        llm: From vLLM.
        plan: What `vllm-cascade plan` says of it, made before it started.
    """

    def __init__(self, llm: Any, plan: Plan) -> None:
        super().__init__(llm)
        self.llm, self.plan = llm.llm_engine, plan
        impls = cascade_impls(self.runner.compilation_config)
        if not impls:
            raise RefusalError("no layer of the engine is the cascade's")
        if impls[0].config != plan.config:
            raise RefusalError(f"planned {plan.config.summary()}, is {impls[0].config.summary()}")
        self.vocabulary = llm.model_config.get_vocab_size()

    def play(self, case: Case, name: str) -> dict[str, Any]:
        """Run a row's requests to their end.

        Args:
            case: The row.
            name: Of the row.

        Raises:
            RefusalError: See the module.
        """
        from vllm import SamplingParams

        draw = random.Random(0)
        sampling = SamplingParams(
            temperature=0.0, max_tokens=case.output_tokens, ignore_eos=True, detokenize=False
        )
        for number in range(case.requests):
            tokens = [draw.randrange(2, self.vocabulary) for _ in range(case.prompt_tokens)]
            self.llm.add_request(f"{name}-{number}", {"prompt_token_ids": tokens}, sampling)
        self.preemptions = 0
        most_blocks = most_of_one = most_together = told = 0
        first_token = together_since = 0.0
        together_steps, together_until, finished = 0, 0.0, {}
        begin = time.perf_counter()
        managers = self.manager.coordinator.single_type_managers
        while self.llm.has_unfinished_requests():
            for output in self.llm.step():
                if output.finished:
                    finished[output.request_id] = len(output.outputs[0].token_ids)
            now = time.perf_counter() - begin
            decoding = sum(request.num_output_tokens > 0 for request in self.scheduler.running)
            first_token = first_token or (now if decoding else 0.0)
            if decoding == case.requests:
                together_since = together_since or now
                together_steps += 1
                together_until = now
            most_together = max(most_together, decoding)
            most_blocks = max(most_blocks, self.held())
            of_each = [len(blocks) for m in managers for blocks in m.req_to_blocks.values()]
            most_of_one = max([most_of_one, *of_each])
            if now - told > 10:
                told = now
                computed = sum(r.num_computed_tokens for r in self.scheduler.running)
                print(f"{name}: {now:.0f} s, {computed:,} tokens, {self.held():,} blocks held")
        seconds = time.perf_counter() - begin
        bound = self.plan.max_blocks
        if self.preemptions:
            raise RefusalError(f"{self.preemptions} preemptions")
        if sorted(finished.values()) != [case.output_tokens] * case.requests:
            raise RefusalError(f"requests ended with {sorted(finished.values())} tokens")
        if most_of_one != bound:
            raise RefusalError(f"a request held {most_of_one} blocks; at most it is {bound}")
        if most_together != case.requests or most_blocks != case.requests * bound:
            raise RefusalError(
                f"{most_together} of {case.requests} requests decoded together and held "
                f"{most_blocks} blocks at most; expected {case.requests} x {bound}"
            )
        if self.held():
            raise RefusalError(f"{self.held()} blocks are missing from the pool afterwards")
        predicted = case.requests * self.plan.request_bytes
        measured = most_blocks * self.block_bytes
        if predicted != measured:
            raise RefusalError(f"predicted {predicted:,} bytes of KV, measured {measured:,}")
        spent = together_until - together_since
        return {
            "row": name,
            "requests": case.requests,
            "prompt_tokens": case.prompt_tokens,
            "output_tokens": case.output_tokens,
            "cascade": self.plan.config.summary(),
            "blocks_per_request": most_of_one,
            "kv_mib_predicted": round(predicted / MIB, 1),
            "kv_mib_measured": round(measured / MIB, 1),
            "kv_mib_full_attention": round(full_attention_bytes(self.plan, case) / MIB, 1),
            "preemptions": self.preemptions,
            "first_token_s": round(first_token, 2),
            "together_steps": together_steps,
            "ms_per_step_together": round(1e3 * spent / max(1, together_steps - 1), 2),
            "seconds": round(seconds, 1),
        }


def full_attention_bytes(plan: Plan, case: Case) -> int:
    """What vLLM's own attention would hold for the row's requests."""
    tokens = case.prompt_tokens + case.output_tokens
    return case.requests * plan.full_attention_bytes * tokens // plan.config.max_model_len


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--rows", help=f"of {', '.join(FULL.cases)}, with commas between")
    parser.add_argument("--output", type=Path, help=f"default: {OUTPUT.name}; none with --tiny")
    arguments = parser.parse_args()
    if not arguments.tiny and arguments.output is None:
        arguments.output = OUTPUT
    if arguments.rows and not set(arguments.rows.split(",")) <= set(FULL.cases):
        parser.error(f"rows are {', '.join(FULL.cases)}")
    return arguments


def main() -> int:
    arguments = parse()
    sys.stdout.reconfigure(line_buffering=True)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    sizes = TINY if arguments.tiny else FULL
    names = arguments.rows.split(",") if arguments.rows else list(sizes.cases)
    stated = conditions()
    print(in_words(stated))
    rows, refused = [], []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(sizes.model))
        plan = plan_of(Path(folder), sizes.cascade, sizes.engine)
        print(plan.as_text())
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            seed=0,
            attention_backend="CASCADE",
            enable_prefix_caching=False,
            additional_config={"cascade": sizes.cascade},
            **sizes.engine,
        )
        engine = Engine(llm, plan)
        for name in names:
            try:
                rows.append(engine.play(sizes.cases[name], name))
            except RefusalError as error:
                refused.append(name)
                print(f"{name} IS NOT REPORTED: {error}")
            if rows and arguments.output:
                write_rows(arguments.output, stated, rows)
        llm.llm_engine.engine_core.shutdown()
    for row in rows:
        print("\n" + "\n".join(f"{name:24} {value}" for name, value in row.items()))
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
