"""Find a passkey that stands early in a text longer than the KV budget, in three caches.

Full attention keeps every token. `window` keeps the first tokens and the newest ones, in a budget
of 2,048 tokens. The cascade has the same budget: by plain attention scores in four sub-caches, and
by the default policy `blend`. Each engine runs in a process of its own, one after the other; blocks
and bytes are read from the engine's pool while it works.

    python examples/passkey.py                  the demo: three prompts
    python examples/passkey.py --count 20       how often each cache answers right, five depths
"""

import argparse
import sys
import time
from typing import Any

import prepare_model
from engine import Completion, Engine
from texts import Passkey, passkey

BUDGET = {"cache_tokens": 2048, "num_sink_tokens": 64, "stride": 256}
PLAIN_SCORES = {"selection_window": 64, "score_power": 1, "key_weight": 0}
CACHES: dict[str, dict[str, Any] | None] = {
    "full attention": None,
    "window": BUDGET | {"policy": "window"},
    "cascade, plain scores": BUDGET | PLAIN_SCORES | {"num_sub_caches": 4},
    "cascade, blend": BUDGET | {"policy": "blend", "num_sub_caches": "auto"},
    "cascade, paper": BUDGET | {"policy": "paper", "num_sub_caches": 4},
}
SHOWN = ["full attention", "window", "cascade, plain scores", "cascade, blend"]
ANSWER_TOKENS = 8


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


def make_passkeys(tokenizer: Any, count: int, prompt_tokens: int) -> list[Passkey]:
    """The demo's three prompts, or `count` of each filler and of that length, at five depths."""

    def num_tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    if count == 0:
        return [
            passkey("sentences", num_tokens, 4096, 0.1, seed=1),
            passkey("bible", num_tokens, 4096, 0.1, seed=2),
            passkey("sentences", num_tokens, 8000, 0.2, seed=3),
        ]
    return [
        passkey(filler, num_tokens, prompt_tokens, 0.1 + 0.2 * (seed % 5), seed)
        for filler in ("sentences", "bible")
        for seed in range(count)
    ]


def answer(
    cache: str, dtype: str, tokenizer: Any, passkeys: list[Passkey], status: Status
) -> list[Completion]:
    """What one cache answers to every prompt."""
    completions: list[Completion] = []
    status.show(f"{cache}: starting the engine", keep=True)
    with Engine(**engine_options(cache, dtype)) as engine:
        for index, hidden in enumerate(passkeys):
            prompt = tokenizer(hidden.prompt)["input_ids"]
            where = f"{cache}: prompt {index + 1} of {len(passkeys)}"

            def progress(done: int, where: str = where, of: int = len(prompt)) -> None:
                status.show(f"{where}, {done:,} of {of:,} tokens read")

            progress(0)
            got = engine.complete(prompt, ANSWER_TOKENS, progress)
            text = " ".join(got.text.split())
            status.show(f"{where} answered in {got.total_s:.1f} s: {text}", keep=True)
            completions.append(got)
    return completions


def answer_rows(
    passkeys: list[Passkey], answers: dict[str, list[Completion]]
) -> list[tuple[str, ...]]:
    """One row for each prompt and cache: what it answered, and what that took."""
    rows = [("prompt", "cache", "answer", "", "KV blocks", "KV memory", "seconds")]
    for index, hidden in enumerate(passkeys):
        for number, (cache, completions) in enumerate(answers.items()):
            got = completions[index]
            title = f"{got.num_prompt_tokens:,} tokens, {hidden.filler}, key {hidden.answer}"
            rows.append(
                (
                    "" if number else title,
                    cache,
                    " ".join(got.text.split()),
                    "right" if hidden.answer in got.text else "wrong",
                    f"{got.num_blocks}",
                    f"{got.kv_bytes / 2**20:.0f} MiB",
                    f"{got.total_s:.1f}",
                )
            )
    return rows


def rate_rows(
    passkeys: list[Passkey], answers: dict[str, list[Completion]]
) -> list[tuple[str, ...]]:
    """One row for each cache: how many answers are right, by filler."""
    fillers = list(dict.fromkeys(hidden.filler for hidden in passkeys))
    rows = [("cache", *fillers, "most KV blocks", "seconds a prompt")]
    for cache, completions in answers.items():
        shares = []
        for filler in fillers:
            pairs = zip(passkeys, completions, strict=True)
            right = [p.answer in c.text for p, c in pairs if p.filler == filler]
            shares.append(f"{sum(right)} of {len(right)}")
        blocks = max(c.num_blocks for c in completions)
        seconds = sum(c.total_s for c in completions) / len(completions)
        rows.append((cache, *shares, f"{blocks}", f"{seconds:.1f}"))
    return rows


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows, the first of them the heading, in columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    heading, *rest = rows
    for row in [heading, ["-" * width for width in widths], *rest]:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=0, help="prompts of each filler; 0: the demo")
    parser.add_argument("--tokens", type=int, default=4096, help="length of those prompts")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=SHOWN)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    # Where the output goes to a file, progress is to be seen there all the same.
    sys.stdout.reconfigure(line_buffering=True)
    prepare_model.prepare()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepare_model.FOLDER)
    passkeys, status = make_passkeys(tokenizer, arguments.count, arguments.tokens), Status()
    answers = {
        cache: answer(cache, arguments.dtype, tokenizer, passkeys, status)
        for cache in arguments.caches
    }
    print()
    print_table((rate_rows if arguments.count else answer_rows)(passkeys, answers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
