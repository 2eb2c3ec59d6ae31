"""Finds alone: a request that no client should send, which is served, or which ends the server."""

from __future__ import annotations

import concurrent.futures
import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.servers import Server, serve
from e2e.support import model_folder
from e2e.tiny import save_llama

pytestmark = pytest.mark.model

CASCADE = {
    "cache_tokens": 192,
    "num_sub_caches": 4,
    "num_sink_tokens": 16,
    "stride": 64,
    "selection_window": 64,
}
MAX_MODEL_LEN = 2000
VOCABULARY = 49_152

# A request with this is refused if it may outgrow the budget.
EXACT: dict[str, Any] = {"vllm_xargs": {"cascade_exact": True}}
# What a request has instead of something sensible -> words of the message.
REFUSED = [
    ({"prompt": [7] * (MAX_MODEL_LEN + 1)}, "maximum context length is 2000"),
    ({"prompt": "far too long " * MAX_MODEL_LEN}, "maximum context length is 2000"),
    ({"prompt": [7] * MAX_MODEL_LEN}, "max_tokens must be at least 1, got 0"),
    ({"max_tokens": MAX_MODEL_LEN + 1}, "cannot be greater than max_model_len=2000"),
    ({"max_tokens": 2**63}, "cannot be greater than max_model_len=2000"),
    ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ({"min_tokens": 10**9}, "min_tokens must be less than or equal to max_tokens"),
    ({"truncate_prompt_tokens": 10**9}, "truncate_prompt_tokens"),
    ({"prompt": ""}, "must be provided and non-empty"),
    ({"prompt": []}, "at least one prompt"),
    ({"prompt": [[]]}, "prompt cannot be empty"),
    ({"prompt": None}, "must be provided and non-empty"),
    ({"prompt": [VOCABULARY]}, f"{VOCABULARY} is out of vocabulary"),
    ({"prompt": [-1]}, "greater than or equal to 0"),
    ({"temperature": -1}, "temperature must be non-negative"),
    ({"temperature": math.nan}, "temperature must be a finite number"),
    ({"temperature": math.inf}, "temperature must be a finite number"),
    ({"top_p": 0}, "top_p must be in (0, 1]"),
    ({"top_p": math.nan}, "top_p must be in (0, 1]"),
    ({"top_k": -2}, "top_k must be 0"),
    ({"min_p": math.nan}, "min_p must be in [0, 1]"),
    ({"repetition_penalty": 0}, "repetition_penalty must be greater than zero"),
    ({"repetition_penalty": math.nan}, "repetition_penalty must be a finite number"),
    ({"presence_penalty": math.nan}, "presence_penalty must be in [-2, 2]"),
    ({"n": 0}, "n must be at least 1"),
    ({"n": 10**7}, "n must be at most"),
    ({"seed": 2**63}, "body.seed"),
    ({"logprobs": 10**6}, "greater than max allowed"),
    ({"prompt_logprobs": 10**6}, "greater than max allowed"),
    ({"logit_bias": {str(VOCABULARY): 1}}, "out-of-vocab"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [10**9]}, "out-of-vocab"),
    ({"stop_token_ids": [10**30]}, "out-of-vocab"),
    ({"stop": [""]}, "stop cannot contain an empty string"),
    ({"structured_outputs": {"regex": "("}}, "invalid regex"),
    ({"prompt": [7] * 273, **EXACT}, "exact for the first 272 tokens of a request"),
    ({"prompt": [7] * 260, "max_tokens": 14, **EXACT}, "Give a max_tokens of at most 13"),
    ({"vllm_xargs": {"cascade_exact": "yes"}}, "cascade_exact = 'yes': must be true or false"),
]
# Odd, but allowed; the last two make NaN and infinities of the request's own logits.
ALLOWED = [
    {"top_k": 10**12},
    {"temperature": 1e-30},
    {"prompt": [7], "min_tokens": 64, "max_tokens": 64},
    {"prompt": [7] * (MAX_MODEL_LEN - 1), "max_tokens": 1},
    {"logit_bias": {"5": math.nan}},
    {"repetition_penalty": 1e-300},
    {"prompt": [7] * 260, "max_tokens": 13, **EXACT},
]
SENSIBLE = {"prompt": "It was a dark and stormy night. " * 60, "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    flags = [
        "--served-model-name=llama",
        f"--tokenizer={model_folder()}",
        "--dtype=float32",
        "--enforce-eager",
        "--block-size=16",
        f"--max-model-len={MAX_MODEL_LEN}",
        "--max-num-batched-tokens=256",
        f"--additional-config={json.dumps({'cascade': CASCADE})}",
    ]
    with serve(
        folder, save_llama(folder / "llama", vocab_size=VOCABULARY), *flags, forked=True
    ) as server:
        yield server
        assert server.process.poll() is None, server.tail()


@pytest.fixture(scope="module")
def expected(server: Server) -> str:
    """The answer to a sensible request, many times the budget long."""
    status, answer = post(server, SENSIBLE)
    assert status == 200
    assert answer["usage"]["prompt_tokens"] > 2 * CASCADE["cache_tokens"]
    return answer["choices"][0]["text"]


def post(server: Server, fields: dict[str, Any]) -> tuple[int, Any]:
    """Status and body of a completion; sent as it is, past a client's own checks."""
    body = {"model": "llama", "prompt": "Good morning", "max_tokens": 8, **fields}
    request = urllib.request.Request(
        f"{server.address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize(
    ("fields", "words"), REFUSED, ids=[f"{i}-{'-'.join(r[0])}" for i, r in enumerate(REFUSED)]
)
def test_refused_with_a_400(
    server: Server, expected: str, fields: dict[str, Any], words: str
) -> None:
    status, answer = post(server, fields)
    assert status == 400
    assert words in answer["error"]["message"]
    status, answer = post(server, SENSIBLE)
    assert (status, answer["choices"][0]["text"]) == (200, expected)


def test_odd_requests_change_no_others(server: Server, expected: str) -> None:
    """Sensible requests in the same batches get what they get alone."""
    requests = [fields for odd in ALLOWED for fields in (odd, SENSIBLE)]
    with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda fields: post(server, fields), requests))
    assert [status for status, _ in answers] == [200] * len(requests)
    assert {answer["choices"][0]["text"] for _, answer in answers[1::2]} == {expected}
