"""Engines of any number of ranks in processes of their own, and what all their ranks kept."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from e2e import forks
from e2e.servers import SMALL_POOL, Server

SECONDS = 420
# Two ranks add in another order than one. Of logits below 16 in float32 that is some 1e-5.
TIE, NEAR_TIES = 1e-3, 0.01
# What a user would write. Prompts and options come as a file: a command line has an end.
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        given = json.load(file)
    llm = LLM(given["model"], attention_backend="CASCADE", **given["options"])
    sampling = SamplingParams(
        temperature=0, max_tokens=given["answer"], ignore_eos=True, detokenize=False, logprobs=2
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in given["prompts"]]
    if given["begun"]:
        begun = max(given["prompts"], key=len)[:given["begun"]]
        first = SamplingParams(max_tokens=1, detokenize=False)
        llm.generate([{"prompt_token_ids": begun}], first, use_tqdm=False)
    done, ranks = [], []
    for batch in [[prompt] for prompt in prompts] if given["alone"] else [prompts]:
        done += llm.generate(batch, sampling, use_tqdm=False)
        ranks.append(llm.collective_rpc("kept_tokens"))
    outputs = [request.outputs[0] for request in done]
    steps = [
        [sorted((each.logprob for each in step.values()), reverse=True) for step in output.logprobs]
        for output in outputs
    ]
    found = {
        "answers": [list(output.token_ids) for output in outputs],
        "margins": [[best - second for best, second, *_ in each] for each in steps],
        "cached": [request.num_cached_tokens for request in done],
        # What each rank kept, of one batch after the other.
        "ranks": [sum(batches, []) for batches in zip(*ranks)],
    }
    with open(sys.argv[2], "w") as file:
        json.dump(found, file)
"""


@dataclass(frozen=True, slots=True)
class Played:
    """What an engine answered and kept.

    Args:
        answers: Token ids, per prompt.
        margins: By how much the token chosen led the next one, in nats, per prompt and step.
        cached: Tokens that another request had computed, per prompt.
        kept: Tokens computed -> [num_layers, num_kv_heads, kept] of all ranks, in logical order.
        log: What all processes printed.
    """

    answers: list[list[int]]
    margins: list[list[float]]
    cached: list[int]
    kept: dict[int, torch.Tensor]
    log: str

    @property
    def ranks(self) -> int:
        """How many logged that CASCADE serves their layers."""
        return ranks_in(self.log)


def play(
    folder: Path,
    model: str,
    prompts: list[list[int]],
    answer: int,
    *,
    alone: bool = False,
    begun: int = 0,
    forked: bool = False,
    **options: Any,
) -> Played:
    """Let all ranks of an engine answer, in processes of their own.

    Args:
        folder: For its files.
        model: Folder of the model.
        prompts: Token ids; no two of one length.
        answer: Tokens to generate for each.
        alone: One request after the other, as a server without load has them.
        begun: Tokens of the longest prompt that another request computes before.
        forked: Whether the processes are forks of this one, which spares each of them the import of
            vLLM; not where CUDA is in use.
        options: Of `LLM`; the cascade's have to switch `trace_tokens` on.
    """
    script, given, found = folder / "play.py", folder / "given.json", folder / "found.json"
    script.write_text(SCRIPT)
    options |= {
        "skip_tokenizer_init": True,
        "seed": 0,
        "worker_extension_cls": "vllm_cascade.trace.WorkerExtension",
    }
    environment: dict[str, str | None] = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Ray would show a line that several ranks log once only.
        "RAY_DEDUP_LOGS": "0",
    }
    if forked:
        # Of the size that the variable asks for a pool takes a second to be made.
        environment["VLLM_CPU_KVCACHE_SPACE"] = None
        options.setdefault("kv_cache_memory_bytes", SMALL_POOL)
    if forked or not any(name.endswith("_parallel_size") for name in options):
        # One rank needs no process of its own.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    given.write_text(
        json.dumps(
            {
                "model": model,
                "prompts": prompts,
                "answer": answer,
                "alone": alone,
                "begun": begun,
                "options": options,
            }
        )
    )
    found.unlink(missing_ok=True)
    command, log = [str(script), str(given), str(found)], folder / "log"
    run = forks.run if forked else run_script
    code = run(command, log, SECONDS, **environment)
    said = log.read_text()
    assert code == 0 and found.exists(), said[-6000:]
    results = json.loads(found.read_text())
    lengths = [len(prompt) + answer - 1 for prompt in prompts]
    together = join(results["ranks"])
    return Played(
        answers=results["answers"],
        margins=results["margins"],
        cached=results["cached"],
        kept={num_tokens: together[num_tokens] for num_tokens in lengths},
        log=said,
    )


def run_script(command: list[str], log: Path, seconds: float, **environment: str | None) -> int:
    """As `forks.run`, in a process of its own."""
    given = {name: value for name, value in {**os.environ, **environment}.items() if value}
    with log.open("w") as stream:
        return subprocess.run(
            [sys.executable, *command],
            stdout=stream,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            env=given,
        ).returncode


def ranks_in(log: str) -> int:
    """How many processes logged that CASCADE serves their layers; Ray may show a line twice.

    A rank within the front end's process has no number in its lines.
    """
    return len(set(re.findall(r"(?:pid=(\d+)\) )?INFO .*CASCADE: policy=", log)))


def ask(server: Server, replica: int, prompt: list[int], answer: int) -> list[int]:
    """What one replica of a server of the model `tiny` answers, as token ids.

    Args:
        server: It runs.
        replica: Number of the engine.
        prompt: Token ids.
        answer: Tokens to generate.
    """
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": answer,
        "temperature": 0,
        "ignore_eos": True,
        "detokenize": False,
        "return_token_ids": True,
    }
    headers = {"Content-Type": "application/json", "X-data-parallel-rank": str(replica)}
    url = f"{server.address}/v1/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(request, timeout=120))["choices"][0]["token_ids"]


def check_replicas(
    server: Server, count: int, prompts: list[list[int]], expected: Played, ranks: int
) -> None:
    """Hold every replica's answers, metrics and log against a single engine's answers.

    Args:
        server: Of the model `tiny`, with no request before.
        count: Replicas.
        prompts: What `expected` answered; one at least is past the budget.
        expected: Of one engine.
        ranks: Of all replicas together.
    """
    for replica in range(count):
        found = dataclasses.replace(
            expected,
            answers=[ask(server, replica, prompt, len(expected.answers[0])) for prompt in prompts],
        )
        # What was kept is not asked for.
        assert_same_up_to_ties(found, expected)
    text = urllib.request.urlopen(f"{server.address}/metrics", timeout=30).read().decode()
    series = r'^vllm_cascade:request_span_tokens_count{engine="(\d+)".*} (\S+)$'
    counted = {(str(replica), f"{len(prompts):.1f}") for replica in range(count)}
    assert set(re.findall(series, text, re.MULTILINE)) == counted
    assert ranks_in(server.log.read_text()) == ranks


def join(ranks: list[list[dict[str, Any]]]) -> dict[int, torch.Tensor]:
    """Put together what the ranks kept: the heads of a layer, and the layers of the stages.

    Args:
        ranks: Of each rank, in order, what `WorkerExtension.kept_tokens` returns.

    Returns:
        Tokens computed -> int64 [num_layers, num_kv_heads, kept] of the newest such request.
    """
    found: dict[int, dict[int, list[list[int]]]] = {}
    for rank in ranks:
        # The newest of each length: a graph's capture runs rows of its own before.
        for num_tokens, layers in {each["num_tokens"]: each["layers"] for each in rank}.items():
            for name, heads in layers.items():
                number = int(re.findall(r"\d+", name)[0])
                found.setdefault(num_tokens, {}).setdefault(number, []).extend(heads)
    return {
        num_tokens: torch.tensor([layers[number] for number in sorted(layers)])
        for num_tokens, layers in found.items()
    }


def assert_same_up_to_ties(
    found: Played, expected: Played, tie: float = TIE, near_ties: float = NEAR_TIES
) -> None:
    """Compare answers and kept tokens of each prompt.

    Args:
        found: Of several ranks.
        expected: Of one.
        tie: Tokens whose lead was at most this, in nats, may be chosen otherwise; all that such
            an answer says and keeps from there on is not compared.
        near_ties: Share of a request's kept tokens that may be others.
    """
    for number, num_tokens in enumerate(expected.kept):
        pairs = zip(found.answers[number], expected.answers[number], strict=True)
        differing = [step for step, (token, wanted) in enumerate(pairs) if token != wanted]
        if differing:
            lead = expected.margins[number][differing[0]]
            assert lead <= tie, (num_tokens, differing[0], lead)
            continue
        kept, wanted = found.kept[num_tokens], expected.kept[num_tokens]
        assert kept.shape == wanted.shape, num_tokens
        assert (kept != wanted).float().mean() <= near_ties, num_tokens
    same = sum(a == b for a, b in zip(found.answers, expected.answers, strict=True))
    assert 2 * same > len(expected.answers), "most answers end in ties"
