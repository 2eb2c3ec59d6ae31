"""What requests held when they ended, found by the tokens of a request that may go on from there.

A block of a cascade holds what has survived all later tokens, so two requests cannot share a block.
But a later request can go on from an earlier request's blocks if the later one's tokens begin with
all tokens that the earlier one computed. Then the later request takes the blocks over, or gets
copies of the blocks. The blocks of an end count as free: the pool hands out those that were used
least recently, when no other block is free, and then the end is forgotten.
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
    """The point where a request ended, or where a running request was copied.

    Args:
        num_tokens: Tokens that the request had computed.
        whole: vLLM's hash of the tokens in whole blocks; adapter and salt are in the hash.
        rest: The tokens after the whole blocks.
        blocks: All blocks that the request held, or copies of them, in the order of its row.
        is_prompt: Whether the request had computed no token of an answer. Then other requests may
            begin with the same tokens.
    """

    num_tokens: int
    whole: BlockHash
    rest: list[int]
    blocks: list[KVCacheBlock]
    is_prompt: bool


def num_known(request: Request) -> int:
    """Count the tokens that a request has computed and that are its own.

    Drafts that were accepted behind the token that ends an answer are computed, but are none of the
    answer's. The same holds for tokens of steps that are under way.
    """
    return min(request.num_computed_tokens, request.num_tokens)


class Ends:
    """The ends whose blocks nobody has taken yet.

    Args:
        block_pool: vLLM's pool.
        block_size: Tokens in a block, which is what vLLM hashes.
        group_id: vLLM's number of the KV cache group that CASCADE's layers are.
    """

    def __init__(self, block_pool: BlockPool, block_size: int, group_id: int) -> None:
        self._pool, self._block_size, self._group_id = block_pool, block_size, group_id
        # First block -> end.
        self._ends: dict[int, End] = {}
        # Number of whole blocks of tokens -> their hash -> ends. By hash, because thousands of ends
        # may be kept, and each waiting request is looked up in each step.
        self._by_hash: dict[int, dict[BlockHash, list[End]]] = {}
        # First block of copies that the worker has yet to make -> the originals.
        self._originals: dict[int, list[KVCacheBlock]] = {}

    def keep(self, request: Request, blocks: list[KVCacheBlock]) -> bool:
        """Give the blocks of a finished request back to the pool, and remember them as an end.

        Args:
            request: The request.
            blocks: All blocks that it held.

        Returns:
            Whether the blocks were given back. If not, nothing was done: a block is still being
            copied, or the request's tokens do not tell what the blocks hold.
        """
        num_tokens = num_known(request)
        # A block with a second reference is still being copied.
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
            blocks: All blocks that hold these tokens.

        Returns:
            As `copy`; an empty list if there is an end of the same tokens already, or if the
            request's tokens do not tell what the blocks hold.
        """
        found = self.find(request, num_tokens)
        is_there = found is not None and found.num_tokens == num_tokens
        if is_there or not self._is_told(request, num_tokens):
            return []
        copied = self.copy(blocks)
        copies = [copy for _, copy in copied]
        self._originals[copies[0].block_id] = blocks
        self._add(self._end(request, num_tokens, copies, is_prompt=True))
        return copied

    def copies_are_made(self) -> None:
        """Note that the worker will make all copies so far before it computes anything."""
        self._originals.clear()

    def find(self, request: Request, most: int) -> End | None:
        """Find the longest end whose tokens a request begins with.

        Args:
            request: A waiting or running request.
            most: Most tokens that the end may have; of a waiting request not all, since a step has
                to compute one.

        Returns:
            The end, or None. The end is kept, and its blocks still count as free.
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
        """Hand an end's blocks over to one request; the end is forgotten.

        Args:
            blocks: Of an end that `find` returned.
        """
        self._remove(self._ends[blocks[0].block_id])
        self._pool.touch(blocks)
        for block in blocks:
            block.reset_hash()

    def copy(self, blocks: list[KVCacheBlock]) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """Take a new block for the copy of each block; the worker copies before it computes.

        Args:
            blocks: Of an end that `find` returned, or of a running request.

        Returns:
            Pairs (block, its copy). Each of the two has one reference more than its holder's;
            vLLM drops this reference once the worker has copied.
        """
        blocks = self._originals.get(blocks[0].block_id, blocks)
        self._pool.touch(blocks)
        copies = self._pool.get_new_blocks(len(blocks))
        self._pool.touch(copies)
        return list(zip(blocks, copies, strict=True))

    def _is_told(self, request: Request, num_tokens: int) -> bool:
        """Whether hash and tokens tell a request's first `num_tokens` tokens from another's."""
        number = num_tokens // self._block_size
        # With asynchronous scheduling a step may run for a token that is not known here yet. Images
        # and embeddings are in the hashes of whole blocks, but not in the tokens after them.
        told = num_tokens <= request.num_tokens and 0 < number <= len(request.block_hashes)
        return told and not request.mm_features and request.prompt_embeds is None

    def _end(
        self,
        request: Request,
        num_tokens: int,
        blocks: list[KVCacheBlock],
        *,
        is_prompt: bool,
    ) -> End:
        number = num_tokens // self._block_size
        rest = list(request.all_token_ids[number * self._block_size : num_tokens])
        whole = request.block_hashes[number - 1]
        return End(num_tokens, whole, rest, blocks, is_prompt)

    def _add(self, end: End) -> None:
        first, number = end.blocks[0].block_id, end.num_tokens // self._block_size
        self._ends[first] = end
        self._by_hash.setdefault(number, {}).setdefault(end.whole, []).append(end)
        if end.is_prompt:
            # No look-up finds the blocks by this hash. The hash makes the pool hand them out last.
            for block in end.blocks:
                block.set_block_hash(make_block_hash_with_group_id(end.whole, self._group_id))
        self._pool.unpin_blocks(end.blocks, partial(self._forget, end))

    def _forget(self, end: End, _: KVCacheBlock) -> None:
        """Forget an end, of which the pool has handed out a block."""
        if self._ends.get(end.blocks[0].block_id) is end:
            self._remove(end)

    def _remove(self, end: End) -> None:
        del self._ends[end.blocks[0].block_id]
        number = end.num_tokens // self._block_size
        hashed = self._by_hash[number]
        hashed[end.whole].remove(end)
        if not hashed[end.whole]:
            del hashed[end.whole]
        if not hashed:
            del self._by_hash[number]
