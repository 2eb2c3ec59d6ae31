"""Which requests go on from which ends, and which prompts are copied for others to go on from.

A chat's next turn takes over the blocks of the turn before. Of what was a prompt alone a request
gets a copy, as more requests may begin with it. For the same reason a long prompt is copied while
it is computed, shortly before its end.

What vLLM calls for a request of a model with prefix caching, in this order:

1. The patch of `KVCacheManager.get_computed_blocks` asks `CascadeManager.continued_by` where the
   waiting request can go on: `find`. It asks again in each step until the request is admitted.
2. `get_num_blocks_to_allocate` counts the blocks to be copied as well: `Progress.copies`.
3. On admission `add_local_computed_blocks` fills the row: `begin`, with blocks that are taken over
   or with copies, then `allocate_new_blocks` adds others.
4. `cache_blocks`, in each step: `step`, which may copy the prompt.
5. `take_pending_cow_copies`, at the end of each step's scheduling: the worker makes these copies
   before it computes anything.
6. `free`: `end` keeps what the request held, for others to go on from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_cascade.kv_cache.ends import Ends

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    Copies = list[tuple[KVCacheBlock, KVCacheBlock]]

# The last tokens of a prompt, taken to be the request's own question. What stands before them may
# be a text that other requests have too, and is worth a copy.
QUESTION_TOKENS = 256


@dataclass(slots=True)
class Progress:
    """What is known of a request beside its blocks.

    Args:
        promised: Blocks that its prompt will hold, as promised on admission.
        request: vLLM's request, once it runs with prefix caching.
        copies: Whether it goes on from a copy, until it is admitted.
        taken_tokens: Tokens that the blocks it took over stand for, until its first step.
        was_copied: Whether there is a copy of its prompt.
    """

    promised: int = 0
    request: Request | None = None
    copies: bool = False
    taken_tokens: int = 0
    was_copied: bool = False


class Continuation:
    """Decides where requests go on.

    Args:
        ends: Where earlier requests ended.
        least_copied: Fewest tokens of a prompt that are worth a copy: a copy costs as much
            whatever is in it.
    """

    def __init__(self, ends: Ends, least_copied: int) -> None:
        self._ends, self._least_copied = ends, least_copied
        # Whether vLLM asks where requests can go on. False for models with other caches beside
        # CASCADE's: the patch does not ask for them.
        self._is_asked = False

    def find(
        self, request: Request, progress: Progress, most: int, num_free: int, need: int
    ) -> tuple[list[KVCacheBlock], int]:
        """Where a waiting request can go on.

        Args:
            request: A request that has computed nothing.
            progress: Its own.
            most: Most tokens that may be taken as computed.
            num_free: Free blocks.
            need: Blocks that all of its tokens will take.

        Returns:
            Blocks to begin with, and the tokens they stand for; none and 0 if it has to begin at
            the beginning.
        """
        self._is_asked = True
        progress.copies = False
        end = self._ends.find(request, most)
        if end is None:
            return [], 0
        num_unheld = sum(block.ref_cnt == 0 for block in end.blocks)
        if end.is_prompt and num_unheld + need <= num_free:
            progress.copies = True
        elif num_unheld < len(end.blocks):
            # Another request is about to get a copy, so these cannot be taken over.
            return [], 0
        return end.blocks, end.num_tokens

    def begin(
        self, progress: Progress, blocks: list[KVCacheBlock], num_tokens: int
    ) -> tuple[list[KVCacheBlock], Copies]:
        """Admit a request that goes on.

        Args:
            progress: Its own.
            blocks: From `find`.
            num_tokens: From `find`.

        Returns:
            The blocks of its row, and what the worker has to copy into them.
        """
        if progress.copies:
            progress.copies = False
            copied = self._ends.copy(blocks)
            return [copy for _, copy in copied], copied
        self._ends.take(blocks)
        progress.taken_tokens = num_tokens
        return blocks, []

    def wants_copy(self, progress: Progress, num_tokens: int) -> int:
        """Tokens of the request's prompt that are to be copied before the step runs, or 0.

        Args:
            progress: Of a running request.
            num_tokens: Tokens that it will have computed after the step.
        """
        request = progress.request
        assert request is not None
        num_held = request.num_computed_tokens or progress.taken_tokens
        progress.taken_tokens = 0
        # The step leaves at most a question to compute, so all before it is held now.
        is_last = num_held < request.num_prompt_tokens < num_tokens + QUESTION_TOKENS
        is_worth_it = self._is_asked and num_held >= self._least_copied
        return num_held if is_worth_it and is_last and not progress.was_copied else 0

    def copy_prompt(
        self, progress: Progress, num_tokens: int, blocks: list[KVCacheBlock]
    ) -> Copies:
        """Copy a running request's prompt, for others to go on from.

        Args:
            progress: Its own.
            num_tokens: From `wants_copy`.
            blocks: The blocks that hold them.

        Returns:
            What the worker has to copy.
        """
        assert progress.request is not None
        progress.was_copied = True
        return self._ends.keep_copy(progress.request, num_tokens, blocks)

    def end(self, progress: Progress | None, blocks: list[KVCacheBlock]) -> bool:
        """Keep what a request held, for others to go on from.

        Args:
            progress: Of a request that gives its blocks back; None if nothing is known of it.
            blocks: All of them.

        Returns:
            Whether they were given back to the pool: not those of a request that is preempted, or
            whose tokens do not tell what they hold.
        """
        request = None if progress is None else progress.request
        has_ended = request is not None and request.is_finished() and self._is_asked
        return has_ended and self._ends.keep(request, blocks)
