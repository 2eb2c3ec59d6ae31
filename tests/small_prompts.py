"""Prompts of an evaluation, made of small texts with a tokenizer of one token a letter."""

from __future__ import annotations

from vllm_cascade.evaluation.prompts import PromptBuilder
from vllm_cascade.evaluation.tasks import TaskOptions, make_prompts
from vllm_cascade.evaluation.texts import Texts

BOS, EOS = 0, 1

FIVE_LETTERS = "abcdefghijklmno"
WORDS = tuple(a + b + "x" for a in FIVE_LETTERS for b in FIVE_LETTERS)
BOOK = "\n".join(f"In the year {year} nothing came to pass. All was well." for year in range(400))
LONG_CLASS = "class Long:\n" + "    # all of this belongs together\n\n" * 80
CODE = "\n\n\n".join(
    LONG_CLASS if n == 30 else f"# Number {n}.\n@cache\ndef step_{n}(x):\n    return x + {n}"
    for n in range(60)
)
TEXTS = Texts((BOOK,), WORDS, CODE)


class Tokenizer:
    """One token a character, after two special ones."""

    all_special_ids = (BOS, EOS)
    chat_template = "stub"

    def encode(self, text, add_special_tokens):
        return [BOS] * add_special_tokens + [ord(char) + 2 for char in text]

    def decode(self, token_ids):
        return "".join(chr(token - 2) for token in token_ids if token > 1)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **_):
        assert not tokenize and add_generation_prompt
        return f"<user>{messages[0]['content']}</user><assistant>"


def prompts_of(task, *, filler="words", length=3000, count=5, seed=0, chat=False, texts=TEXTS):
    builder = PromptBuilder(Tokenizer(), texts, chat)
    return make_prompts(builder, task, filler, length, count, seed, TaskOptions())


def text_of(prompt):
    return Tokenizer().decode(prompt.token_ids)
