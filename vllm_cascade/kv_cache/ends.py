"""What requests held when they ended, found by the tokens of a request that may go on from there.

A block of a cascade holds what survived all that came after it, so no two requests can share one.
But a request whose tokens begin with all those that an earlier one computed can go on from that
one's blocks, if it takes them over or gets copies of them. All of these blocks count as free
meanwhile: the pool hands them out when it has no others, and then the end is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
    from vllm.v1.request import Request


@dataclass(frozen=True, slots=True, eq=False)
class End:
    """Where a request has ended, or where a running one was copied.

    Args:
        num_tokens: Tokens that the request had computed.
        whole: vLLM's hash of its whole blocks of tokens, which counts adapter and salt in.
        rest: Its tokens after those.
        blocks: All that it held, or copies of all that it held.
        is_prompt: Whether it had computed no token of an answer. Then others may begin like it.
        is_copy: Whether `blocks` are copies, of a request that was still running.
    """

    num_tokens: int
    whole: BlockHash
    rest: list[int]
    blocks: list[KVCacheBlock]
    is_prompt: bool
    is_copy: bool


class Ends:
    """The ends of requests whose blocks no other has taken yet.

    Args:
        block_pool: vLLM's pool.
        block_size: Tokens of a block that is hashed.
        group_id: Of the layers among the model's.
    """

    def __init__(self, block_pool: BlockPool, block_size: int, group_id: int) -> None:
        self._pool, self._block_size, self._group_id = block_pool, block_size, group_id
        # First block -> end.
        self._ends: dict[int, End] = {}
        # Number of whole blocks of tokens -> their hash -> ends. Thousands may be kept, and each
        # waiting request is looked up in each step.
        self._by_hash: dict[int, dict[BlockHash, list[End]]] = {}
        # First block of copies that the worker has yet to make -> the originals.
        self._originals: dict[int, list[KVCacheBlock]] = {}
        # The ends that are copies, by first block, the oldest first.
        self._copies: dict[int, End] = {}
        # Blocks of the ends that are copies (True) and of the others (False).
        self._num_blocks = {True: 0, False: 0}

    @property
    def num_unused(self) -> int:
        """Free blocks, those of droppable copies of prompts included."""
        return self._pool.get_num_free_blocks() - self._num_blocks[False]

    def new_blocks(self, number: int) -> list[KVCacheBlock]:
        """Take blocks out of the pool; as long as there is a prompt's copy, no end is lost.

        Args:
            number: How many, of those that are free.
        """
        missing = number - (self.num_unused - self._num_blocks[True])
        for copy in list(self._copies.values()) if missing > 0 else ():
            if missing > 0 and all(block.ref_cnt == 0 for block in copy.blocks):
                missing -= len(copy.blocks)
                self.take(copy.blocks)
                # Without a hash they come first.
                self._pool.free_blocks(copy.blocks)
        return self._pool.get_new_blocks(number)

    def keep(self, request: Request, blocks: list[KVCacheBlock]) -> bool:
        """Give the blocks of a finished request back to the pool, and remember what they hold.

        Args:
            request: The request.
            blocks: All that it held.

        Returns:
            Whether its tokens tell what the blocks hold. If not, nothing was done.
        """
        num_tokens = request.num_computed_tokens
        # Others with a reference are still being copied.
        if not blocks or any(block.ref_cnt > 1 for block in blocks):
            return False
        if not self._is_told(request, num_tokens):
            return False
        is_prompt = num_tokens <= request.num_prompt_tokens
        self._add(self._end(request, num_tokens, blocks, is_prompt=is_prompt))
        return True

    def keep_copy(
        self, request: Request, num_tokens: int, blocks: list[KVCacheBlock]
    ) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """Copy what a running request holds of its prompt, and remember the copy as an end.

        Args:
            request: The running request.
            num_tokens: Tokens of its prompt that it has computed.
            blocks: All blocks that hold them.

        Returns:
            As `copy`; nothing if there is such an end already, or if the request's tokens do not
            tell what the blocks hold.
        """
        found = self.find(request, num_tokens)
        is_there = found is not None and found.num_tokens == num_tokens
        if is_there or not self._is_told(request, num_tokens):
            return []
        copied = self.copy(blocks)
        copies = [copy for _, copy in copied]
        self._originals[copies[0].block_id] = blocks
        self._add(self._end(request, num_tokens, copies, is_prompt=True, is_copy=True))
        return copied

    def copies_are_made(self) -> None:
        """Note that the worker makes all copies so far before it computes anything else."""
        self._originals.clear()

    def find(self, request: Request, most: int) -> End | None:
        """The longest end with which the tokens of a request begin.

        Args:
            request: Any request.
            most: Most tokens of the end; fewer than the request has, since one is to be computed.

        Returns:
            The end, or None. Its blocks are the pool's still.
        """
        if request.mm_features or request.prompt_embeds is not None:
            return None
        hashes = request.block_hashes
        found = [
            end
            for number, hashed in self._by_hash.items()
            if number <= len(hashes)
            for end in hashed.get(hashes[number - 1], ())
            if end.num_tokens <= most
            and request.all_token_ids[number * self._block_size : end.num_tokens] == end.rest
        ]
        return max(found, key=lambda end: end.num_tokens, default=None)

    def take(self, blocks: list[KVCacheBlock]) -> None:
        """Hand over an end's blocks, from which nobody else can go on then.

        Args:
            blocks: Of an end that `find` returned.
        """
        self._remove(self._ends[blocks[0].block_id])
        self._pool.touch(blocks)
        for block in blocks:
            block.reset_hash()

    def copy(self, blocks: list[KVCacheBlock]) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """Take as many new blocks, into which the worker will copy before it computes anything.

        Args:
            blocks: Of an end that `find` returned.

        Returns:
            Each block and its copy. Both have one more reference, which vLLM drops once the
            worker has copied.
        """
        blocks = self._originals.get(blocks[0].block_id, blocks)
        self._pool.touch(blocks)
        copies = self.new_blocks(len(blocks))
        self._pool.touch(copies)
        return list(zip(blocks, copies, strict=True))

    def _is_told(self, request: Request, num_tokens: int) -> bool:
        """Whether a request's first tokens can be told from another's."""
        number = num_tokens // self._block_size
        # A step may be under way for a token that is not known here. Images and embeddings are in
        # the hashes, but not in what follows them.
        told = num_tokens <= request.num_tokens and 0 < number <= len(request.block_hashes)
        return told and not request.mm_features and request.prompt_embeds is None

    def _end(
        self,
        request: Request,
        num_tokens: int,
        blocks: list[KVCacheBlock],
        *,
        is_prompt: bool,
        is_copy: bool = False,
    ) -> End:
        number = num_tokens // self._block_size
        rest = list(request.all_token_ids[number * self._block_size : num_tokens])
        whole = request.block_hashes[number - 1]
        return End(num_tokens, whole, rest, blocks, is_prompt, is_copy)

    def _add(self, end: End) -> None:
        first, number = end.blocks[0].block_id, end.num_tokens // self._block_size
        self._ends[first] = end
        self._by_hash.setdefault(number, {}).setdefault(end.whole, []).append(end)
        self._num_blocks[end.is_copy] += len(end.blocks)
        if end.is_copy:
            self._copies[first] = end
        if end.is_prompt:
            # The hash is a dummy: nothing finds the blocks by it. It makes the pool hand them out
            # last.
            for block in end.blocks:
                block.set_block_hash(make_block_hash_with_group_id(end.whole, self._group_id))
        self._pool.unpin_blocks(end.blocks, partial(self._forget, end))

    def _forget(self, end: End, _: KVCacheBlock) -> None:
        """One of its blocks is another request's now."""
        if self._ends.get(end.blocks[0].block_id) is end:
            self._remove(end)

    def _remove(self, end: End) -> None:
        del self._ends[end.blocks[0].block_id]
        self._copies.pop(end.blocks[0].block_id, None)
        self._num_blocks[end.is_copy] -= len(end.blocks)
        number = end.num_tokens // self._block_size
        hashed = self._by_hash[number]
        hashed[end.whole].remove(end)
        if not hashed[end.whole]:
            del hashed[end.whole]
        if not hashed:
            del self._by_hash[number]
