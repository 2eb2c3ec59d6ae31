"""Long answers: how often they repeat themselves, by cache.

Prompts of a few words, answers of thousands of tokens, far past a small budget, all drawn at one
temperature with the same seeds. An answer that loops says again what it has said: the program
counts the runs of 16 tokens in the answer's last quarter that stand earlier in the same answer.
Full attention ends at the model's own limit of positions, and is given up to that.

    python benchmarks quality.long_answers
        writes benchmarks/results/long_answers.csv
    python benchmarks quality.long_answers --tokens 300 --count 2 --cache-tokens 128 --output x.csv
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from engine import processes
from records import RESULTS, ROOT, RefusalError, conditions, write_rows

OUTPUT = RESULTS / "long_answers.csv"
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"
CACHES: dict[str, dict[str, Any] | None] = {
    "full": None,
    "window": {"policy": "window"},
    "distinct_fixed": {"policy": "distinct", "structure": "fixed"},
    "distinct": {"policy": "distinct"},
}
RUN = 16
THINGS = ("a lighthouse", "a clockmaker", "two rivers", "the first winter", "a lost map")
FORMS = ("a long story", "a long letter", "a play in many acts", "a detailed report")


def prompts_of(count: int) -> list[str]:
    """The first `count` of the texts that are asked for."""
    all_of_them = [f"Write {form} about {thing}." for form in FORMS for thing in THINGS]
    if not 0 < count <= len(all_of_them):
        raise RefusalError(f"--count {count}: there are {len(all_of_them)} prompts")
    return all_of_them[:count]


def repeated(tokens: list[int]) -> float:
    """Share of the runs of `RUN` tokens in the last quarter that stand earlier as well."""
    runs = [tuple(tokens[at : at + RUN]) for at in range(len(tokens) - RUN + 1)]
    begin, seen = len(runs) * 3 // 4, set(runs[: len(runs) * 3 // 4])
    found = 0
    for run in runs[begin:]:
        found += run in seen
        seen.add(run)
    return found / max(1, len(runs) - begin)


def answer(arguments: argparse.Namespace) -> None:
    """In a process of its own: answer all prompts with one cache, write the tokens."""
    import torch
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"max_model_len": 8192}
    if CACHES[arguments.cache] is not None:
        common = {"cache_tokens": arguments.cache_tokens, "stride": arguments.stride}
        options = {
            "attention_backend": "CASCADE",
            "additional_config": {"cascade": {**common, **(CACHES[arguments.cache] or {})}},
            "max_model_len": arguments.tokens + 256,
        }
    llm = LLM(
        str(arguments.model),
        dtype=arguments.dtype,
        max_num_seqs=arguments.count,
        block_size=32,
        seed=0,
        gpu_memory_utilization=0.3,
        # Graphs of whole decode steps, without a compiler's minute.
        enforce_eager=not torch.cuda.is_available(),
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        kv_cache_memory_bytes=arguments.kv_bytes,
        **options,
    )
    tokens = min(arguments.tokens, options["max_model_len"] - 256)
    sampling = [
        SamplingParams(temperature=0.8, seed=number, max_tokens=tokens, ignore_eos=True)
        for number in range(arguments.count)
    ]
    chats = [[{"role": "user", "content": text}] for text in prompts_of(arguments.count)]
    found = llm.chat(chats, sampling, use_tqdm=False)
    arguments.result.write_text(json.dumps([list(each.outputs[0].token_ids) for each in found]))
    llm.llm_engine.engine_core.shutdown()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8_000, help="of an answer")
    parser.add_argument("--count", type=int, default=20, help="prompts")
    parser.add_argument("--caches", default=",".join(CACHES), help="default: %(default)s")
    parser.add_argument("--cache-tokens", type=int, default=1024)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-bytes", type=int, default=6 << 30)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--timeout", type=int, default=3600, help="seconds that a cache may take")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    for name, kind in (("--cache", str), ("--result", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.cache:
        answer(arguments)
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for cache in arguments.caches.split(","):
            result = Path(folder) / f"{cache}.json"
            command = processes.command("quality.long_answers", *sys.argv[1:])
            command += ["--cache", cache, "--result", str(result)]
            done = subprocess.run(
                command, timeout=arguments.timeout, env=processes.environment(), check=False
            )
            if done.returncode:
                print(f"{cache}: exit code {done.returncode}", file=sys.stderr)
                return 1
            answers = json.loads(result.read_text())
            lengths = {len(each) for each in answers}
            shares = sorted(map(repeated, answers))
            rows.append(
                {
                    "cache": cache,
                    "answers": len(answers),
                    "tokens": max(lengths),
                    "finished": sum(len(each) == max(lengths) for each in answers),
                    "repeated_median": round(statistics.median(shares), 3),
                    "repeated_mean": round(statistics.fmean(shares), 3),
                    "loops": sum(share > 0.5 for share in shares),
                }
            )
            print({name: rows[-1][name] for name in list(rows[-1])}, flush=True)
    stated = conditions() | {
        "model": arguments.model.name,
        "dtype": arguments.dtype,
        "cache_tokens": arguments.cache_tokens,
        "stride": arguments.stride,
    }
    write_rows(arguments.output, stated, rows)
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
