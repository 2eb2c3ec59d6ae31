"""Decode as CUDA graphs: the same as without, and never waiting for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import SamplingParams

from e2e.support import engine
from e2e.tiny import CASCADE, random_prompt, save_llama
from gpu.probe import compiled_anew, watched

pytestmark = pytest.mark.gpu

# Under the budget, at it, where it fills while the answer grows, and far past it.
LENGTHS = [5, 100, 143, 208, 333, 1001]
ANSWER = 140
OPTIONS: dict[str, Any] = {
    "block_size": 16,
    "max_model_len": 4096,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 2000,
    "skip_tokenizer_init": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), head_dim=64)


def graphs(*sizes: int) -> dict[str, Any]:
    """Options of an engine that has graphs for batches of these sizes, and no torch.compile."""
    return {
        "enforce_eager": False,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": list(sizes),
        },
    }


def generate(llm: Any) -> list[Any]:
    """The answers to prompts of all lengths."""
    return llm.generate(
        [{"prompt_token_ids": random_prompt(n, seed=n)} for n in LENGTHS],
        SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )


def play(
    model: str, policy: str, **options: Any
) -> tuple[list[list[int]], dict[int, dict[str, Any]], int]:
    """(answers, tokens computed -> kept tokens per layer, graphs replayed) of all prompts."""
    with engine(
        {**CASCADE, "policy": policy, "trace_tokens": True},
        model,
        worker_extension_cls="vllm_cascade.trace.WorkerExtension",
        **OPTIONS,
        **options,
    ) as llm:
        with watched() as steps:
            outputs = generate(llm)
        # The newest of each length: a graph's capture runs rows of its own before.
        found = {
            each["num_tokens"]: each["layers"] for each in llm.collective_rpc("kept_tokens")[0]
        }
    kept = {n + ANSWER - 1: found[n + ANSWER - 1] for n in LENGTHS}
    return [list(output.outputs[0].token_ids) for output in outputs], kept, steps.replays


@pytest.fixture(scope="module", params=["distinct", "blend"])
def policy(request: pytest.FixtureRequest) -> str:
    """Without scores, and with scores that every decoded token adds to."""
    return request.param


@pytest.fixture(scope="module")
def eager(model: str, policy: str) -> tuple[list[list[int]], dict[int, dict[str, Any]], int]:
    return play(model, policy, enforce_eager=True)


@pytest.mark.parametrize("sizes", [range(1, 9), [8]], ids=["exact", "padded"])
def test_graphs_equal_eager(model: str, policy: str, eager: Any, sizes: Any) -> None:
    answers, kept, replays = play(model, policy, **graphs(*sizes))
    assert eager[2] == 0
    assert replays >= ANSWER - 1
    assert answers == eager[0]
    # A padded batch is multiplied by other kernels of cuBLAS, so that near-ties may go either way.
    near_ties = 0 if len(sizes) == 8 else 0.01
    for num_tokens, layers in eager[1].items():
        expected = torch.tensor(list(layers.values()))
        differing = expected != torch.tensor(list(kept[num_tokens].values()))
        assert differing.float().mean() <= near_ties, num_tokens


def test_no_request_waits_for_a_kernel_to_be_compiled(model: str, policy: str) -> None:
    with (
        compiled_anew() as compiled,
        engine(
            CASCADE | {"policy": policy},
            model,
            dtype="bfloat16",
            **OPTIONS,
            **graphs(1, 2, 4, 8),
        ) as llm,
    ):
        assert "_write_kernel" in compiled
        compiled.clear()
        generate(llm)
        assert not compiled


def test_decode_never_waits_for_the_device(model: str) -> None:
    """Across three boundaries of each request; all of a decode step is one graph."""
    answer = 3 * CASCADE["stride"] + 10
    lengths = [300, 333, 401]
    with engine(
        CASCADE,
        model,
        dtype="bfloat16",
        **(OPTIONS | {"max_num_batched_tokens": 2048}),
        **graphs(4, 8),
    ) as llm:
        prompts = [{"prompt_token_ids": random_prompt(n, seed=n)} for n in lengths]
        sampling = SamplingParams(
            temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False, logprobs=0
        )
        # Kernels are compiled and loaded once.
        llm.generate(prompts, sampling, use_tqdm=False)
        with watched(forbid_sync=True) as steps:
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
        layers = llm.model_config.hf_config.num_hidden_layers
    assert steps.decodes >= answer - 1
    assert steps.replays == steps.decodes
    assert steps.forwards == layers * (len(steps.plans) - steps.decodes)
    for output in outputs:
        logprobs = [next(iter(step.values())).logprob for step in output.outputs[0].logprobs]
        assert len(logprobs) == answer
        assert torch.tensor(logprobs).isfinite().all()
