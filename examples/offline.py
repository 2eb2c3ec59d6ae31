"""Answer one question about a long text with the cascade, in vLLM's offline API.

python examples/offline.py [MODEL]
"""

import os
import sys

from vllm import LLM, SamplingParams

import prepare_model
from texts import king_james


def main() -> None:
    # GiB; without it vLLM's CPU build wants nearly all of the machine's memory.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    model = sys.argv[1] if len(sys.argv) > 1 else str(prepare_model.prepare())
    llm = LLM(
        model,
        attention_backend="CASCADE",
        max_model_len=16_384,  # twice what this model was trained for
        additional_config={"cascade": {"cache_tokens": 2048}},
    )
    text = "The first book of Moses, called Genesis.\n" + king_james()[:40_000]
    for output in llm.generate([text], SamplingParams(temperature=0.0, max_tokens=48)):
        print(
            f"{len(output.prompt_token_ids):,} tokens read; it goes on: {output.outputs[0].text!r}"
        )


if __name__ == "__main__":
    main()
