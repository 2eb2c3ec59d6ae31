"""Which requests go on from which ends, and which prompts are copied for others to go on from.

A chat's next turn takes over the blocks of the turn before. If an end is that of a prompt without
an answer, a request gets a copy instead, because more requests may begin with the same prompt. For
the same reason a long prompt is copied while it is computed, shortly before the prompt's end.

With prefix caching vLLM makes these calls for a request, in this order:

1. The patch of `KVCacheManager.get_computed_blocks` asks `CascadeManager.continued_by` where the
   waiting request can go on. `find` answers, in each step until the request is admitted.
2. `get_num_blocks_to_allocate` counts the new blocks that the request needs, and the originals of
   a copy (`Progress.copies`), which are not free until the copy is made.
3. On admission `add_local_computed_blocks` fills the row, with blocks that `begin` takes over or
   copies. Then `allocate_new_blocks` adds the blocks that are missing.
4. `cache_blocks`, in each step, may have the prompt copied: `wants_copy`, then `copy_prompt`.
5. `take_pending_cow_copies`, at the end of each step's scheduling, hands the copies to the worker,
   which makes them before it computes anything.
6. `free` lets `end` keep what the request held, for other requests to go on from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_cascade.kv_cache.ends import Ends

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    Copies = list[tuple[KVCacheBlock, KVCacheBlock]]

# Trailing tokens of a prompt that are assumed to be the request's own question. The text before the
# question may be that of other requests too, and is worth a copy.
QUESTION_TOKENS = 256


@dataclass(slots=True)
class Progress:
    """What is known of a request beside its blocks.

    Args:
        promised: Blocks that the request's prompt will hold, counted on admission.
        num_tokens: Tokens computed once all steps scheduled so far have run.
        request: vLLM's request, once it runs with prefix caching; until then None.
        copies: Whether the request will go on from a copy; False once it is admitted.
        taken_tokens: Tokens of the end that the request took over; 0 after its first step.
        was_copied: Whether the request's prompt was copied.
    """

    promised: int = 0
    num_tokens: int = 0
    request: Request | None = None
    copies: bool = False
    taken_tokens: int = 0
    was_copied: bool = False


class Continuation:
    """Decides where requests go on.

    Args:
        ends: Where earlier requests ended.
        least_copied: Fewest tokens of a prompt that are worth a copy; a copy has a cost of its own,
            however few tokens it saves.
    """

    def __init__(self, ends: Ends, least_copied: int) -> None:
        self._ends, self._least_copied = ends, least_copied
        # Whether vLLM asks where requests can go on. False for hybrid models, which the patch
        # `continued_requests` leaves out.
        self._is_asked = False

    def find(
        self, request: Request, progress: Progress, most: int, num_free: int, need: int
    ) -> tuple[list[KVCacheBlock], int]:
        """Find where a waiting request can go on.

        Args:
            request: A request that has computed nothing.
            progress: The request's.
            most: Most tokens that may be taken as computed.
            num_free: Free blocks of the pool.
            need: Blocks that the request's row will hold with all its tokens.

        Returns:
            Blocks to take over or to copy, and the number of tokens computed in them; no blocks
            and 0 if the request has to begin at the beginning.
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
            # A copy of these blocks is pending for another request, so they cannot be taken over.
            return [], 0
        return end.blocks, end.num_tokens

    def begin(
        self, progress: Progress, blocks: list[KVCacheBlock], num_tokens: int
    ) -> tuple[list[KVCacheBlock], Copies]:
        """Begin an admitted request with what `find` gave.

        Args:
            progress: The request's.
            blocks: From `find`.
            num_tokens: From `find`.

        Returns:
            The first blocks of the request's row, and pairs (block, its copy) for the worker.
        """
        if progress.copies:
            progress.copies = False
            copied = self._ends.copy(blocks)
            return [copy for _, copy in copied], copied
        self._ends.take(blocks)
        progress.taken_tokens = num_tokens
        return blocks, []

    def wants_copy(self, progress: Progress, num_tokens: int) -> int:
        """Decide whether a request's prompt is to be copied before the step runs.

        Args:
            progress: A running request's.
            num_tokens: Tokens that the request will have computed after the step.

        Returns:
            Tokens of the prompt to copy, which are those computed so far; 0 for no copy.
        """
        request = progress.request
        assert request is not None
        num_held = request.num_computed_tokens or progress.taken_tokens
        progress.taken_tokens = 0
        # The step comes to the question: after it, less than a question is left to compute. What
        # the request holds now lies before the question.
        is_last = num_held < request.num_prompt_tokens < num_tokens + QUESTION_TOKENS
        is_worth_it = self._is_asked and num_held >= self._least_copied
        return num_held if is_worth_it and is_last and not progress.was_copied else 0

    def copy_prompt(
        self, progress: Progress, num_tokens: int, blocks: list[KVCacheBlock]
    ) -> Copies:
        """Copy a running request's prompt, for other requests to go on from.

        Args:
            progress: The request's.
            num_tokens: From `wants_copy`.
            blocks: The blocks that hold these tokens.

        Returns:
            Pairs (block, its copy) for the worker.
        """
        assert progress.request is not None
        progress.was_copied = True
        return self._ends.keep_copy(progress.request, num_tokens, blocks)

    def end(self, progress: Progress | None, blocks: list[KVCacheBlock]) -> bool:
        """Keep what a request held, for other requests to go on from.

        Args:
            progress: Of the request that gives its blocks back; None if it never had one.
            blocks: All blocks of the request.

        Returns:
            Whether the blocks were given back to the pool. If not, nothing was done: the request
            is preempted, or its tokens do not tell what the blocks hold.
        """
        request = None if progress is None else progress.request
        has_ended = request is not None and request.is_finished() and self._is_asked
        return has_ended and self._ends.keep(request, blocks)
