"""The demo's model on an engine that answers one prompt at a time."""

import os
from collections.abc import Callable
from typing import Any

from prepare_model import FOLDER
from vllm_cascade.evaluation import engine
from vllm_cascade.evaluation.engine import Completion, Request

__all__ = ["Completion", "Engine"]


class Engine(engine.Engine):
    """An engine on the demo's model; a context manager.

    Args:
        options: keyword arguments for `vllm.LLM`.
    """

    def __init__(self, **options: Any) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        super().__init__(str(FOLDER), max_num_seqs=1, enforce_eager=True, **options)

    def complete(
        self,
        prompt: list[int],
        max_tokens: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Completion:
        """Answer one prompt greedily.

        Args:
            prompt: token ids.
            max_tokens: tokens to generate; at least 2.
            progress: called after each step with how many tokens of the prompt are computed.
        """
        request = Request(prompt, max_tokens)
        return self.run([request], lambda computed, finished: progress(computed))[0]
