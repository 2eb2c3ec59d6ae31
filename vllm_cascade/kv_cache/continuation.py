"""Which requests go on from what earlier requests computed.

What requests compute before the first boundary that moves something is found in whole blocks, and
shared or copied (`Prefix`). Beyond it, a chat's next turn takes over the blocks of the turn before
(`Ends`). If an end is that of a prompt without an answer, a request gets a copy instead, because
more requests may begin with the same prompt. For the same reason a long prompt is copied while it
is computed, shortly before the prompt's end.

With prefix caching vLLM makes these calls for a request, in this order:

1. The patch of `KVCacheManager.get_computed_blocks` asks `CascadeManager.continued_by` where the
   waiting request can go on. `find` answers, in each step until the request is admitted.
2. `get_num_blocks_to_allocate` counts the new blocks that the request needs, and the originals of
   copies (`Progress.copied`), which are not free until the copies are made. For a request that had
   better wait a step (`Progress.waits`) it counts more blocks than there are.
3. On admission `add_local_computed_blocks` fills the row, with blocks that `begin` shares, takes
   over or copies. Then `allocate_new_blocks` adds the blocks that are missing. In the step that
   comes to the first boundary, `Prefix.leave` ends the sharing of the request's blocks.
4. `cache_blocks`, in each step, lets others find the full blocks before the boundary
   (`Prefix.add`), and may have the prompt copied: `wants_copy`, then `copy_prompt`.
5. `take_pending_cow_copies`, at the end of each step's scheduling, hands the copies to the worker,
   which makes them before it computes anything.
6. `free` lets `end` keep what the request held, for other requests to go on from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_cascade.kv_cache.ends import End, Ends, num_known
from vllm_cascade.kv_cache.prefix import Prefix

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
        end: The end that the request will go on from; None where blocks of a prefix were found, and
            once the request is admitted.
        copied: The blocks found that the request will get copies of, by number.
        may_outgrow: Whether the request may come to the first boundary that moves something.
        waits: Whether the request waits for the next step, which can use what this one computes.
        num_known: Blocks at the row's beginning that were found, or that others can find.
        taken_tokens: Tokens of the end that the request took over; 0 after its first step.
        was_copied: Whether the request's prompt was copied.
    """

    promised: int = 0
    num_tokens: int = 0
    request: Request | None = None
    end: End | None = None
    copied: frozenset[int] = frozenset()
    may_outgrow: bool = True
    waits: bool = False
    num_known: int = 0
    taken_tokens: int = 0
    was_copied: bool = False


class Continuation:
    """Decides where requests go on.

    Args:
        ends: Where earlier requests ended.
        prefix: What requests computed before anything moved.
        block_size: Tokens in a block.
        least_copied: Fewest tokens of a prompt that are worth a copy; a copy has a cost of its own,
            however few tokens it saves.
    """

    def __init__(self, ends: Ends, prefix: Prefix, block_size: int, least_copied: int) -> None:
        self._ends, self._prefix, self._block_size = ends, prefix, block_size
        # What ends before anything has moved is found as a prefix.
        self._least_kept = prefix.num_tokens + 1
        self._least_copied = max(least_copied, self._least_kept)
        # Whether vLLM asks where requests can go on. False for hybrid models, which the patch
        # `continued_requests` leaves out.
        self.is_asked = False

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
            Blocks to share, to take over or to copy, and the number of tokens computed in them; no
            blocks and 0 if the request has to begin at the beginning.
        """
        self.is_asked = True
        progress.end, progress.copied, progress.waits = None, frozenset(), False
        end = self._ends.find(request, most)
        if end is not None:
            num_unheld = sum(block.ref_cnt == 0 for block in end.blocks)
            if end.is_prompt and num_unheld + need <= num_free:
                progress.end, progress.copied = end, _numbers(end.blocks)
                return end.blocks, end.num_tokens
            # If some are held, a copy of these blocks is pending for another request, so they
            # cannot be taken over.
            if num_unheld == len(end.blocks):
                progress.end = end
                return end.blocks, end.num_tokens
        blocks = self._prefix.find(request, most)
        num_written = self._prefix.num_written(blocks)
        if 2 * (len(blocks) - num_written) * self._block_size >= request.num_tokens:
            # To wait costs less than to compute half of the tokens again.
            progress.waits = True
            return [], 0
        blocks = blocks[:num_written]
        progress.copied = self._prefix.private(blocks)
        progress.may_outgrow = self._prefix.may_outgrow(request)
        if progress.may_outgrow:
            unheld = [block for block in blocks if block.ref_cnt == 0]
            progress.copied = _numbers(blocks)
            if len(unheld) + need > num_free:
                # Without room for copies, take what nobody holds.
                progress.copied -= _numbers(unheld)
        return blocks, len(blocks) * self._block_size

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
        end, copied = progress.end, progress.copied
        progress.end, progress.copied, progress.num_known = None, frozenset(), len(blocks)
        if end is None:
            return self._prefix.begin(blocks, copied, may_outgrow=progress.may_outgrow)
        if copied:
            copies = self._ends.copy(blocks)
            return [copy for _, copy in copies], copies
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
        is_worth_it = self.is_asked and num_held >= self._least_copied
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
            is preempted, its tokens do not tell what the blocks hold, or the blocks are those of a
            prefix.
        """
        request = None if progress is None else progress.request
        return (
            request is not None
            and request.is_finished()
            and self.is_asked
            and num_known(request) >= self._least_kept
            and self._ends.keep(request, blocks)
        )


def _numbers(blocks: list[KVCacheBlock]) -> frozenset[int]:
    return frozenset(block.block_id for block in blocks)
