"""Find a passkey that stands early in a text longer than the KV budget, in four caches.

Full attention keeps every token. `window` keeps the first tokens and the newest ones, in a budget
of 2,048 tokens. The cascade has the same budget: by the paper's rule in four sub-caches, and by the
default policy `distinct`. Each engine runs in a process of its own, one after the other; blocks and
bytes are read from the engine's pool while it works.

How often each cache is right over many prompts is what `vllm-cascade eval` measures.
"""

import argparse
import sys
import time
from typing import Any

import prepare_model
from demo_engine import Completion, Engine
from vllm_cascade.evaluation.prompts import Prompt, PromptBuilder
from vllm_cascade.evaluation.runner import answer_text
from vllm_cascade.evaluation.tasks import TaskOptions, make_prompts
from vllm_cascade.evaluation.texts import load_texts

BUDGET = {"cache_tokens": 2048, "num_sink_tokens": 64, "stride": 256}
CACHES: dict[str, dict[str, Any] | None] = {
    "full attention": None,
    "window": BUDGET | {"policy": "window"},
    "cascade, paper": BUDGET | {"policy": "paper", "num_sub_caches": 4},
    "cascade, distinct": BUDGET | {"policy": "distinct"},
    "cascade, blend": BUDGET | {"policy": "blend"},
}
SHOWN = ["full attention", "window", "cascade, paper", "cascade, distinct"]
# Filler and length of each prompt.
PROMPTS = [("sentences", 4096), ("book", 4096), ("sentences", 8000)]


def engine_options(cache: str, dtype: str) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM`; small chunks, so that progress is seen."""
    options: dict[str, Any] = {"block_size": 32, "max_num_batched_tokens": 1024, "dtype": dtype}
    if (cascade := CACHES[cache]) is not None:
        options["attention_backend"] = "CASCADE"
        options["additional_config"] = {"cascade": cascade}
    return options


class Status:
    """One line that is rewritten while work goes on; only lines to keep without a terminal."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.start = time.perf_counter()

    def show(self, text: str, keep: bool = False) -> None:
        """Print `text` until the next line comes, or for good if `keep`."""
        line = f"[{time.perf_counter() - self.start:5.0f} s] {text}"
        if self.live:
            print(f"\r\033[K{line}", end="\n" if keep else "", flush=True)
        elif keep:
            print(line, flush=True)


def make_passkeys(tokenizer: Any) -> list[Prompt]:
    """The demo's prompts; the passkey stands in the first fifth of each."""
    builder = PromptBuilder(tokenizer, load_texts(None), chat=False)
    return [
        prompt
        for filler, length in PROMPTS
        for prompt in make_prompts(builder, "passkey", filler, length, 1, 0, TaskOptions())
    ]


def answer(
    cache: str, dtype: str, tokenizer: Any, passkeys: list[Prompt], status: Status
) -> list[tuple[str, Completion]]:
    """What one cache answers to every prompt, and what that took."""
    answers: list[tuple[str, Completion]] = []
    status.show(f"{cache}: starting the engine", keep=True)
    with Engine(**engine_options(cache, dtype)) as engine:
        for index, hidden in enumerate(passkeys):
            where = f"{cache}: prompt {index + 1} of {len(passkeys)}"

            def progress(done: int, where: str = where, of: int = hidden.length) -> None:
                status.show(f"{where}, {done:,} of {of:,} tokens read")

            progress(0)
            got = engine.complete(hidden.token_ids, hidden.max_tokens, progress)
            text = " ".join(answer_text(tokenizer, got.token_ids).split())
            status.show(f"{where} answered in {got.total_s:.1f} s: {text}", keep=True)
            answers.append((text, got))
    return answers


def answer_rows(
    passkeys: list[Prompt], answers: dict[str, list[tuple[str, Completion]]]
) -> list[tuple[str, ...]]:
    """One row for each prompt and cache: what it answered, and what that took."""
    rows = [("prompt", "cache", "answer", "", "KV blocks", "KV memory", "seconds")]
    for index, hidden in enumerate(passkeys):
        (key,) = hidden.expected
        title = f"{hidden.length:,} tokens, {hidden.filler}, key {key}"
        for cache, given in answers.items():
            text, got = given[index]
            rows.append(
                (
                    title,
                    cache,
                    text,
                    "right" if key in text else "wrong",
                    f"{got.num_blocks}",
                    f"{got.kv_bytes / 2**20:.0f} MiB",
                    f"{got.total_s:.1f}",
                )
            )
            title = ""
    return rows


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows, the first of them the heading, in columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    heading, *rest = rows
    for row in [heading, ["-" * width for width in widths], *rest]:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=SHOWN)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    # Where the output goes to a file, progress is to be seen there all the same.
    sys.stdout.reconfigure(line_buffering=True)
    prepare_model.prepare()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepare_model.FOLDER)
    passkeys, status = make_passkeys(tokenizer), Status()
    answers = {
        cache: answer(cache, arguments.dtype, tokenizer, passkeys, status)
        for cache in arguments.caches
    }
    print()
    print_table(answer_rows(passkeys, answers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
