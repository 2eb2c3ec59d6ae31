"""Finds alone: an OpenAI server that does not start, or not answer, as a user starts it.

Its processes are new ones, which find and load the plugin each by itself.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from e2e import forks
from e2e.servers import START_SECONDS, serve
from e2e.support import model_folder
from e2e.tiny import random_prompt, save_llama
from vllm_cascade import cli
from vllm_cascade.structure.config import CascadeConfig
from vllm_cascade.structure.layout import build_layout

pytestmark = pytest.mark.model

BUDGET = {"cache_tokens": 1024, "stride": 256}
POSITIONS = 2048
MAX_MODEL_LEN = 20_000

GENERATE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, prompts, options = (json.loads(argument) for argument in sys.argv[1:])
    llm = LLM(model, attention_backend="CASCADE", skip_tokenizer_init=True, **options)
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, sampling)]
    print("ANSWERS", json.dumps(answers))
"""


def generate(folder: Path, model: str, prompts: list[list[int]], **options: object) -> list:
    """Answers of a script that a user could have written."""
    script, log = folder / "generate.py", folder / "log"
    script.write_text(GENERATE)
    arguments = [json.dumps(argument) for argument in (model, prompts, options)]
    forks.run([str(script), *arguments], log, START_SECONDS)
    said = log.read_text()
    found = re.search(r"^ANSWERS (.*)$", said, re.MULTILINE)
    assert found, said[-3000:]
    return json.loads(found[1])


def test_no_other_option_is_needed(tmp_path: Path) -> None:
    """Default block size, default options, compiled, on a model shorter than the default budget.

    Of one layer: what is compiled for others is the same.
    """
    model = save_llama(tmp_path / "llama", num_hidden_layers=1)
    answers = generate(tmp_path, model, [random_prompt(300, seed=1)])
    assert len(answers[0]) == 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2 that says it was trained for texts a fourth as long, which are soon outgrown."""
    folder, saved = tmp_path_factory.mktemp("model"), Path(model_folder())
    for file in saved.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((saved / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": POSITIONS}))
    return str(folder)


@pytest.fixture(scope="module")
def plan(model: str) -> dict:
    """What `vllm-cascade plan` prints for the server's configuration."""
    command = ["plan", model, f"--max-model-len={MAX_MODEL_LEN}", "--dtype=float32", "--json"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in BUDGET.items()]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(command) == 0
    # vLLM's log comes before.
    return json.loads(re.search(r"^{.*", printed.getvalue(), re.MULTILINE | re.DOTALL)[0])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: str, plan: dict) -> Iterator[str]:
    """Address of `vllm serve` with a model beyond its own length."""
    flags = [
        "--served-model-name=smollm2",
        f"--max-model-len={MAX_MODEL_LEN}",
        f"--additional-config={json.dumps({'cascade': BUDGET})}",
        "--enforce-eager",
        "--enable-auto-tool-choice",
        "--tool-call-parser=hermes",
        # Some processors multiply bfloat16 a hundred times slower.
        "--dtype=float32",
    ]
    with serve(tmp_path_factory.mktemp("server"), model, *flags) as server:
        assert plan["startup_line"] in server.log.read_text()
        yield server.address
        assert server.process.poll() is None, server.tail()


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=300)


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2", prompt="The capital of France is", max_tokens=8, temperature=0
    )
    assert "Paris" in answer.choices[0].text


def test_chat_beyond_budget(client: openai.OpenAI) -> None:
    filler = "The grass is green. The sky is blue. The sun is yellow. " * 100
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": f"{filler}What is the capital of France?"}],
        max_tokens=24,
        temperature=0,
    )
    assert answer.usage.prompt_tokens > BUDGET["cache_tokens"]
    assert answer.choices[0].message.content.strip()


def test_structured_output_beyond_budget(client: openai.OpenAI) -> None:
    filler = "The grass is green. The sky is blue. The sun is yellow. " * 100
    schema = {
        "type": "object",
        "properties": {"colour": {"type": "string", "enum": ["green", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": f"{filler}What is the capital of France?"}],
        max_tokens=32,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "sky", "schema": schema}},
    )
    assert answer.usage.prompt_tokens > BUDGET["cache_tokens"]
    assert json.loads(answer.choices[0].message.content)["colour"] in ("green", "blue")


@pytest.mark.parametrize(
    "choice",
    [{"type": "function", "function": {"name": "paint"}}, "required"],
    ids=["named", "any"],
)
def test_tool_call_beyond_budget(client: openai.OpenAI, choice: Any) -> None:
    """The named tool, or any of those given; its arguments are as the tool's schema has them."""
    filler = "The grass is green. The sky is blue. The sun is yellow. " * 100
    properties = {
        "colour": {"type": "string", "enum": ["green", "blue", "yellow"]},
        "coats": {"type": "integer", "minimum": 1, "maximum": 3},
    }
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    # Without "strict", vLLM asks for JSON of any form.
    function = {"name": "paint", "parameters": schema, "strict": True}
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": f"{filler}Paint the fence like the sky, twice."}],
        max_tokens=128,
        temperature=0,
        tools=[{"type": "function", "function": function}],
        tool_choice=choice,
    )
    assert answer.usage.prompt_tokens > BUDGET["cache_tokens"]
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "paint"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == set(properties)
    assert arguments["colour"] in properties["colour"]["enum"]
    assert arguments["coats"] in (1, 2, 3)


def test_streaming_equals_not_streaming(client: openai.OpenAI) -> None:
    request = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 32, "temperature": 0}
    parts = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
    assert len(parts) > 8
    assert "".join(parts) == client.completions.create(**request).choices[0].text


def test_twenty_requests_at_once(client: openai.OpenAI) -> None:
    """Mixed lengths, some many times the budget, one past the model's own positions."""
    lengths = [3, 20, 150, 1300, 2200, *[10 * i + 7 for i in range(15)]]
    prompts = [" ".join(f"word{j % 97}" for j in range(n // 3 + 1)) for n in lengths]

    def ask(prompt: str) -> openai.types.Completion:
        return client.completions.create(
            model="smollm2",
            prompt=prompt,
            max_tokens=12,
            temperature=0,
            extra_body={"ignore_eos": True},
        )

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, prompts))
    assert len(answers) == 20
    assert max(answer.usage.prompt_tokens for answer in answers) > POSITIONS
    for answer in answers:
        assert answer.usage.completion_tokens == 12
        assert answer.choices[0].text


def test_too_long_a_request_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="20000"):
        client.completions.create(model="smollm2", prompt=[7] * (MAX_MODEL_LEN + 1), max_tokens=1)
    assert client.models.list().data


def test_metrics_count_what_requests_cost(server: str, client: openai.OpenAI, plan: dict) -> None:
    def read() -> dict[str, float]:
        text = urllib.request.urlopen(f"{server}/metrics", timeout=10).read().decode()
        series = r'^vllm_cascade:(\w+){engine="0",model_name="smollm2"} (\S+)$'
        return {name: float(value) for name, value in re.findall(series, text, re.MULTILINE)}

    before = read()
    evicted = []
    for prompt_tokens in (100, 2400):
        answer = client.completions.create(
            model="smollm2",
            prompt=[7] * prompt_tokens,
            max_tokens=8,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        evicted.append(answer.model_extra["kv_transfer_params"]["cascade_evicted_tokens"])
    # A response may be sent before its step is recorded.
    deadline = time.monotonic() + 30
    while read()["request_span_tokens_count"] < before["request_span_tokens_count"] + 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    after = read()
    config = CascadeConfig(**plan["config"])
    assert after["budget_tokens"] == BUDGET["cache_tokens"]
    assert after["reach_tokens"] == plan["reach"] > 2407
    assert after["max_blocks_per_request"] == plan["max_blocks"]
    rise = {name: after[name] - before[name] for name in after}
    assert rise["requests_past_budget_total"] == 1
    held = build_layout(config).held(2407)[1]
    assert rise["tokens_evicted_total"] == 2407 - held > 500
    assert evicted == [0, 2407 - held]
    assert rise["boundaries_run_total"] == build_layout(config).epoch_of(2407)
    assert rise["request_span_tokens_count"] == 2
    assert rise["request_span_tokens_sum"] == 107 + 2407
