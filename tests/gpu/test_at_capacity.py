"""Two hundred requests decode past the budget while another is prefilled, on nearly all memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from e2e.support import core_of, engine, impls_of
from e2e.tiny import random_prompt, save_llama
from gpu.probe import Steps, watched

pytestmark = pytest.mark.gpu

NUM_REQUESTS = 200
ANSWER = 120
CASCADE = {
    "cache_tokens": 256,
    "num_sub_caches": 4,
    "newest_share": 0.0,
    "num_sink_tokens": 16,
    "stride": 64,
    "selection_window": 64,
}
# Bytes that a second run may need above the first: the allocator rounds up to blocks of 2 MiB.
SLACK = 4 << 20


def test_decodes_and_a_prefill_at_gpu_memory_utilization_90_percent(tmp_path: Path) -> None:
    model = save_llama(
        tmp_path,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
    )
    with engine(
        CASCADE,
        model,
        dtype="bfloat16",
        enforce_eager=False,
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [8, 64, 256],
        },
        gpu_memory_utilization=0.9,
        block_size=16,
        max_model_len=8192,
        max_num_batched_tokens=4096,
        max_num_seqs=256,
        skip_tokenizer_init=True,
    ) as llm:
        free, total = torch.cuda.mem_get_info()
        assert free < 0.15 * total
        peaks = []
        for _ in range(2):
            # A second run is to compute what the first did.
            assert llm.reset_prefix_cache()
            torch.cuda.reset_peak_memory_stats()
            with watched() as steps:
                check(llm, steps)
            peaks.append(torch.cuda.max_memory_allocated())
        assert peaks[1] <= peaks[0] + SLACK
        assert torch.cuda.mem_get_info()[0] >= free - (1 << 30)


def check(llm: Any, steps: Steps) -> None:
    """Run all requests, the long one once every other decodes."""
    from vllm_cascade.structure.layout import build_layout

    core, config = llm.llm_engine, impls_of(llm)[0].config
    scheduler = core_of(llm).scheduler
    lengths = [345 + n % 40 for n in range(NUM_REQUESTS)]
    first_merge = build_layout(config).epochs[0].end
    assert min(lengths) > first_merge
    for n, length in enumerate(lengths):
        core.add_request(str(n), prompt(length, seed=n), sampling(ANSWER))
    preemptions, outputs, is_added = 0, {}, False
    preempt = scheduler._preempt_request

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal preemptions
        preemptions += 1
        return preempt(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "_preempt_request", counted)
        while core.has_unfinished_requests():
            decoding = sum(r.num_output_tokens > 0 for r in scheduler.running)
            if decoding == NUM_REQUESTS and not is_added:
                core.add_request("long", prompt(6000, seed=1), sampling(4))
                is_added = True
            for output in core.step():
                outputs[output.request_id] = output
    assert preemptions == 0
    # The long prompt takes two steps.
    mixed = [requests for requests, launches in steps.plans if launches]
    assert mixed.count(NUM_REQUESTS + 1) >= 2
    assert steps.replays == steps.decodes > 0
    assert len(outputs) == NUM_REQUESTS + 1
    for name, output in outputs.items():
        answer = output.outputs[0]
        assert len(answer.token_ids) == (4 if name == "long" else ANSWER)
        given = [next(iter(step.values())).logprob for step in answer.logprobs]
        assert all(math.isfinite(logprob) for logprob in given), name


def prompt(length: int, seed: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": random_prompt(length, seed)}


def sampling(num_tokens: int) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, logprobs=0
    )
