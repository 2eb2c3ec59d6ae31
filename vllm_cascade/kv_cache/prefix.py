"""Blocks that hold what nothing has moved yet, found by vLLM's hashes and shared by requests.

Before the first boundary that moves something, a row holds the request's tokens in order, as in
vLLM's own caches. With a policy without attention scores nobody writes to a full block until its
request runs that boundary, so requests whose tokens begin alike can share it. The boundary writes
to blocks in place, and a row cannot be given other blocks once it runs. So a request that may come
to the boundary gets copies, and so does every other request that finds such a request's blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    Copies = list[tuple[KVCacheBlock, KVCacheBlock]]


class Prefix:
    """Finds full blocks of the tokens that a request begins with.

    Args:
        block_pool: vLLM's pool, which keeps the hashes.
        block_size: Tokens in a block, which is what vLLM hashes.
        group_id: vLLM's number of the KV cache group that CASCADE's layers are.
        num_tokens: Tokens, from a request's first on, that are not moved or changed before the
            request has computed more; 0 for policies with attention scores, which change in every
            step.
        is_bounded: Whether requests can compute more tokens than that.
    """

    def __init__(
        self,
        block_pool: BlockPool,
        block_size: int,
        group_id: int,
        num_tokens: int,
        *,
        is_bounded: bool,
    ) -> None:
        self._pool, self._block_size, self._group_id = block_pool, block_size, group_id
        self.num_tokens, self._is_bounded = num_tokens, is_bounded
        # Blocks, by number, of requests that may come to the boundary.
        self._private: set[int] = set()
        # Blocks that the step being scheduled will write. Nothing can be copied from them yet, and
        # another request's part of the step may run before they are written.
        self._unwritten: set[int] = set()

    def may_outgrow(self, request: Request) -> bool:
        """Whether a request may come to the first boundary that moves something.

        Args:
            request: A request; an input session can always go on.
        """
        # The last token of an answer may be computed as a draft.
        longest = request.num_prompt_tokens + request.max_tokens
        return self._is_bounded and (request.resumable or longest > self.num_tokens)

    def find(self, request: Request, most: int) -> list[KVCacheBlock]:
        """Find the blocks that hold a request's first tokens.

        Args:
            request: A waiting request.
            most: Most tokens that the blocks may hold.

        Returns:
            Full blocks in order. Blocks that the step being scheduled will write may be among the
            last of them.
        """
        number = min(self.num_tokens, most) // self._block_size
        found = []
        for block_hash in request.block_hashes[:number]:
            cached = self._pool.get_cached_block(block_hash, [self._group_id])
            if cached is None:
                break
            found += cached
        if getattr(request, "kv_cache_report_mode", "incremental") == "full":
            # As vLLM does: who reads KV events wants to know about blocks that are used again.
            self._pool.emit_cached_block_events(
                request, len(found), self._block_size, self._group_id
            )
        return found

    def num_written(self, blocks: list[KVCacheBlock]) -> int:
        """Count the blocks before the first one that the step being scheduled will write."""
        numbers = (i for i, block in enumerate(blocks) if block.block_id in self._unwritten)
        return next(numbers, len(blocks))

    def private(self, blocks: list[KVCacheBlock]) -> frozenset[int]:
        """Tell which blocks, by number, may be written to by the request that holds them."""
        return self._private.intersection(block.block_id for block in blocks)

    def begin(
        self, blocks: list[KVCacheBlock], copied: frozenset[int], *, may_outgrow: bool
    ) -> tuple[list[KVCacheBlock], Copies]:
        """Begin a request's row with blocks that were found.

        Args:
            blocks: From `find`.
            copied: Those of which the request gets copies, by number.
            may_outgrow: Whether the request may come to the boundary.

        Returns:
            The first blocks of the row, and pairs (block, its copy) for the worker.
        """
        # All are touched before new blocks are taken, so that the pool hands out none of them. The
        # references to originals are dropped once the worker has copied.
        self._pool.touch(blocks)
        originals = [block for block in blocks if block.block_id in copied]
        new = self._pool.get_new_blocks(len(originals))
        self._pool.touch(new)
        copy_of = {block.block_id: copy for block, copy in zip(originals, new, strict=True)}
        if may_outgrow:
            self.hold([block for block in blocks if block.block_id not in copied])
        row = [copy_of.get(block.block_id, block) for block in blocks]
        return row, list(zip(originals, new, strict=True))

    def hold(self, blocks: list[KVCacheBlock]) -> None:
        """Note that a request that may come to the boundary holds `blocks`."""
        self._private.update(block.block_id for block in blocks)

    def add(
        self, request: Request, row: list[KVCacheBlock], num_known: int, num_tokens: int
    ) -> int:
        """Let others find what a request computes.

        Args:
            request: A request that the step computes, or has computed.
            row: All blocks of the request.
            num_known: Blocks at the row's beginning that were found, or added before.
            num_tokens: Tokens that will be computed after the step.

        Returns:
            Blocks at the row's beginning that have been found or added by now.
        """
        # With a drafter that reads a token ahead, a block's hash has to wait for the next token.
        number = min(self.num_tokens, num_tokens) // self._block_size
        number = min(number, len(request.block_hashes))
        if number <= num_known:
            return num_known
        self._pool.cache_full_blocks(
            request, row, num_known, number, self._block_size, self._group_id
        )
        if self.may_outgrow(request):
            self.hold(row[num_known:number])
        written = request.num_computed_tokens // self._block_size
        self._unwritten.update(block.block_id for block in row[max(num_known, written) : number])
        return number

    def steps_on(self) -> None:
        """Note that the step that was being scheduled will run before any later one."""
        self._unwritten.clear()

    def leave(self, row: list[KVCacheBlock], num_spare: int) -> Copies:
        """Take a request's blocks out of what others can find, because its boundary comes.

        Args:
            row: All blocks of the request.
            num_spare: Free blocks that copies may take.

        Returns:
            Pairs (block, its copy) for the worker, which others find instead; none if the blocks to
            be copied are more than the spare ones.
        """
        known = [block for block in row if block.block_hash is not None]
        written = [block for block in known if block.block_id not in self._unwritten]
        copies: Copies = []
        if written and len(written) <= num_spare:
            # The reference to each is dropped once the worker has copied.
            self._pool.touch(written)
            copies = list(zip(written, self._pool.get_new_blocks(len(written)), strict=True))
            for block, copy in copies:
                self._pool.move_block_hashes(block, copy)
                self._unwritten.add(copy.block_id)
        self._pool.evict_blocks({block.block_id for block in known if block.block_hash is not None})
        self._private.difference_update(block.block_id for block in row)
        return copies

    def free(self, row: list[KVCacheBlock]) -> None:
        """Note that a request gives its blocks back.

        Args:
            row: All blocks of the request.
        """
        numbers = {block.block_id for block in row}
        self._private -= numbers
        # The step that would have written them may run without the request.
        self._pool.evict_blocks(numbers & self._unwritten)
