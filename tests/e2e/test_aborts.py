"""Finds alone: what is left behind by requests that end anywhere, for those that go on at once.

Requests are aborted at any step, or end one token before, at or after a block or a boundary. Others
begin with what they had computed, in the next step or much later.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from e2e.support import cascade_manager_of, engine
from e2e.test_shared_prefix import check_alike, run, sampling
from e2e.tiny import CASCADE, prompt_without_ties, save_llama

MODEL = {"vocab_size": 4096, "tie_word_embeddings": False}
BLOCK, LONGEST, CYCLES = 16, 1024, 80
TEXT = prompt_without_ties(3600, seed=8, neighbours=3600, vocab_size=MODEL["vocab_size"])


def start(model: str, **options: Any) -> Any:
    return engine(
        CASCADE,
        model,
        block_size=BLOCK,
        max_model_len=LONGEST,
        max_num_batched_tokens=256,
        max_num_seqs=4,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        **options,
    )


class Client:
    """Sends requests and leaves them as `random` says.

    Args:
        llm: The engine.
        random: Decides everything.
    """

    def __init__(self, llm: Any, random: Random) -> None:
        self._engine, self._random = llm.llm_engine, random
        self._texts = [TEXT[start : start + 600] for start in range(0, 3600, 600)]
        self._running: dict[str, list[int]] = {}
        self.finished: list[tuple[list[int], Any]] = []
        self.num_aborted = 0

    def cycle(self, number: int) -> None:
        """Send a request, make some steps, perhaps abort one."""
        random = self._random
        prompt = self._prompt()
        # The last token of an answer is not computed.
        grid = random.choice([BLOCK, CASCADE["stride"]])
        end = -(-len(prompt) // grid) * grid + random.choice([-1, 0, 1]) + 1
        length = max(1, min(end, LONGEST) - len(prompt))
        name = str(number)
        self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling(length))
        self._running[name] = prompt
        for _ in range(random.choice([0, 1, 1, 2, 5, 20])):
            self.step()
        if self._running and random.random() < 0.4:
            name = random.choice(sorted(self._running))
            self._engine.abort_request([name])
            self._remember(self._running.pop(name))
            self.num_aborted += 1

    def step(self) -> bool:
        """Make a step; whether there was one to make."""
        if not self._engine.has_unfinished_requests():
            return False
        for output in self._engine.step():
            if output.finished and output.request_id in self._running:
                prompt = self._running.pop(output.request_id)
                self.finished.append((prompt, output))
                self._remember([*prompt, *output.outputs[0].token_ids])
        return True

    def _prompt(self) -> list[int]:
        random = self._random
        text = random.choice([*self._texts, *self._texts[-4:]])
        text = text[: random.choice([len(text), len(text), random.randrange(20, 600)])]
        return [*text, *TEXT[(place := random.randrange(3000)) : place + random.choice([1, 3, 70])]]

    def _remember(self, tokens: list[int]) -> None:
        if len(tokens) < LONGEST - 150:
            self._texts.append(tokens)


def test_requests_that_end_anywhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    check(save_llama(tmp_path_factory.mktemp("llama"), **MODEL), CYCLES, seed=1)


def check(model: str, cycles: int, seed: int) -> None:
    with start(model, enable_prefix_caching=True) as llm:
        client = Client(llm, Random(seed))
        for number in range(cycles):
            client.cycle(number)
        while client.step():
            pass
        manager = cascade_manager_of(llm)
        pool = manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert not manager.req_to_blocks and not manager._progress and not manager._prefix._private
    assert client.num_aborted > cycles // 10
    went_on = [output.num_cached_tokens for _, output in client.finished]
    assert sum(count > 0 for count in went_on) > cycles // 4 and max(went_on) > 400
    with start(model, enable_prefix_caching=False) as llm:
        prompts, outputs = zip(*client.finished, strict=True)
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        check_alike(list(outputs), run(llm, list(prompts), lengths))
