"""SmolLM2 in an engine, far past the reach of its cascade, against the whole-model oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm import SamplingParams

from e2e.support import KeptLog, engine, model_folder, poisoned
from e2e.tiny import by_policy
from reference.cascade import CascadeParameters
from reference.llama import Llama

SHARE_OF_NEAR_TIES = 0.005
REACH_OPTIONS = {
    "cache_tokens": 176,
    "num_sub_caches": 4,
    "num_sink_tokens": 16,
    "stride": 64,
    "selection_window": 64,
    "trace_tokens": True,
}
# Of fixed sub-caches with these options.
REACH = 544


def check_past_reach(
    policy: str,
    tokens_of: Callable[[int], list[int]],
    folder: str | None = None,
    model: Llama | None = None,
    ropes: Sequence[torch.Tensor] | None = None,
    first: Callable[[Any], None] = lambda llm: None,
    cascade: dict[str, Any] = REACH_OPTIONS,
    num_tokens: int = 4 * REACH + 40,
    **options: Any,
) -> None:
    """Assert that every kept set and every log-probability is the oracle's.

    Args:
        policy: The cascade's policy.
        tokens_of: A prompt of so many tokens.
        folder: Of the model; SmolLM2 unless given.
        model: The reference; made of what is in the folder unless given.
        ropes: The reference's table of each layer, if it is not the configuration's.
        first: Called with the engine, for other requests before.
        cascade: The cascade's options.
        num_tokens: Of the prompt.
        options: For the engine.
    """
    folder = folder or model_folder()
    shape = {"block_size": 16, "max_model_len": 4096, "max_num_batched_tokens": 500}
    with engine(by_policy(policy, cascade), folder, **{**shape, **options}) as llm:
        first(llm)
        log = KeptLog(llm)
        prompt = tokens_of(num_tokens)
        with log.recording(), poisoned(llm):
            output = llm.generate(
                {"prompt_token_ids": prompt},
                SamplingParams(temperature=0, max_tokens=40, logprobs=0, prompt_logprobs=0),
                use_tqdm=False,
            )[0]
        answer = output.outputs[0]
        tokens = [*prompt, *answer.token_ids]
        given = [*output.prompt_logprobs[1:], *answer.logprobs]
        logprobs = [step[token].logprob for step, token in zip(given, tokens[1:], strict=True)]
        kept = log.of(output.request_id)
        config = log.config

    model = model or Llama.from_folder(folder, torch.float64)
    run = model.run(tokens, CascadeParameters.like(config), forced=kept, ropes=ropes)
    times = min(4, num_tokens // REACH)
    assert len(kept) > 6 * times
    assert run.comparison.windows > 25 * times * model.config.num_hidden_layers
    assert not run.comparison.unexplained
    assert len(run.comparison.differing) <= SHARE_OF_NEAR_TIES * run.comparison.windows
    torch.testing.assert_close(
        torch.tensor(logprobs, dtype=torch.float64), run.logprobs, rtol=0, atol=1e-3
    )
    near_ties = len(run.comparison.differing)
    print(f"{policy}: {near_ties} near-ties in {run.comparison.windows} windows")
