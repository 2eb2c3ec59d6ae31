"""Time the turns of a long chat, and questions about one long text, on a server that runs.

    vllm serve .models/SmolLM2-135M-Instruct --served-model-name smollm2 \\
        --attention-backend CASCADE --max-model-len 65536 --dtype float32 \\
        --enable-prompt-tokens-details --additional-config '{"cascade": {"cache_tokens": 2048}}'
    python examples/turns.py

What is printed as cached was computed by an earlier request: see docs/serving.md.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import OpenAI

from vllm_cascade.evaluation.texts import king_james

TURNS = 4
QUESTIONS = ("Who was Noah?", "Who built the ark?", "What came first?", "Who was Adam's wife?")


def ask(client: OpenAI, model: str, messages: list[Any], **options: Any) -> str:
    """Send a chat, print a row, and return the answer."""
    begin, first, answer = time.perf_counter(), None, ""
    for chunk in client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        **options,
    ):
        for choice in chunk.choices:
            answer += choice.delta.content or ""
            if first is None and choice.delta.content:
                first = time.perf_counter() - begin
        usage = chunk.usage
    seconds = time.perf_counter() - begin
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    shown = seconds if first is None else first
    print(
        f"{usage.prompt_tokens:>9,} {cached or 0:>9,} {shown:>11.2f} s {seconds:>9.2f} s",
        flush=True,
    )
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--characters", type=int, default=40_000, help="of the Bible")
    arguments = parser.parse_args()
    client, model = OpenAI(base_url=arguments.url, api_key="none"), arguments.model
    text = king_james()[: arguments.characters]

    print(f"a chat\n{'prompt':>9} {'cached':>9} {'first token':>13} {'in all':>11}")
    chat = [{"role": "user", "content": f"{text}\n\nWho speaks in this text?"}]
    for _ in range(TURNS):
        answer = ask(client, model, chat, max_tokens=40)
        chat += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "Say more about that."},
        ]

    print("its first turn again, then another question about the same text")
    ask(client, model, chat[:1], max_tokens=16)
    other = f"{text}\n\nWhere does this text take place, and who is in it?"
    ask(client, model, [{"role": "user", "content": other}], max_tokens=16)

    print("a text, then a question, then all questions at once")
    system = {"role": "system", "content": text}
    # Without what the template writes before an answer: a question follows.
    ask(client, model, [system], max_tokens=1, extra_body={"add_generation_prompt": False})

    def question(words: str) -> str:
        return ask(client, model, [system, {"role": "user", "content": words}], max_tokens=16)

    question(QUESTIONS[0])
    with ThreadPoolExecutor() as pool:
        list(pool.map(question, QUESTIONS))


if __name__ == "__main__":
    main()
