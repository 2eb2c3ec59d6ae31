"""What finished requests held, for a request that goes on where one of them ended.

A block of a cascade holds what survived all that came after it, so no two requests can share one.
But a request whose tokens begin with all those that a finished one computed can go on from its
blocks: a chat's next turn takes them over, and of what was a prompt alone it gets a copy, as more
requests may begin with it. All of them count as free meanwhile.
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
class Ended:
    """Where a request ended.

    Args:
        num_tokens: Tokens it had computed.
        whole: vLLM's hash of those in whole blocks, which counts adapter and salt in.
        rest: The others.
        blocks: All that it held.
        is_prompt: Whether it had computed no token of an answer.
    """

    num_tokens: int
    whole: BlockHash
    rest: list[int]
    blocks: list[KVCacheBlock]
    is_prompt: bool


class Continuations:
    """The ends of requests whose blocks no other has taken yet.

    Args:
        block_pool: vLLM's pool.
        block_size: Tokens of a block that is hashed.
        group_id: Of the layers among the model's.
    """

    def __init__(self, block_pool: BlockPool, block_size: int, group_id: int) -> None:
        self._pool, self._block_size, self._group_id = block_pool, block_size, group_id
        # First block -> end, in the order in which the pool hands their blocks out again.
        self._ended: dict[int, Ended] = {}
        # Whole blocks of tokens -> their hash -> ends. Thousands may be kept, and each request of
        # each step that waits is looked up.
        self._hashed: dict[int, dict[BlockHash, list[Ended]]] = {}

    def keep(self, request: Request, blocks: list[KVCacheBlock]) -> bool:
        """Give back the blocks of a finished request, and remember what they hold.

        Args:
            request: The request.
            blocks: All that it held.

        Returns:
            Whether that can be told from its tokens; if not, nothing was done.
        """
        num_tokens = request.num_computed_tokens
        number = num_tokens // self._block_size
        # A step may be under way for a token that is not known here. Images and embeddings are in
        # the hashes, but not in the rest.
        told = num_tokens <= request.num_tokens and 0 < number <= len(request.block_hashes)
        if not told or not blocks or request.mm_features or request.prompt_embeds is not None:
            return False
        if any(block.ref_cnt > 1 for block in blocks):
            # They are still being copied.
            return False
        rest = list(request.all_token_ids[number * self._block_size : num_tokens])
        is_prompt = num_tokens <= request.num_prompt_tokens
        ended = Ended(num_tokens, request.block_hashes[number - 1], rest, blocks, is_prompt)
        self._ended[blocks[0].block_id] = ended
        self._hashed.setdefault(number, {}).setdefault(ended.whole, []).append(ended)
        if is_prompt:
            # With a hash, though nothing finds them by it, they are given out last again once they
            # have been copied.
            for block in blocks:
                block.set_block_hash(make_block_hash_with_group_id(ended.whole, self._group_id))
        self._pool.unpin_blocks(blocks, partial(self._forget, ended))
        return True

    def find(self, request: Request, most: int) -> Ended | None:
        """The longest end with which the tokens of a request begin, and after which more follow.

        Args:
            request: A request that has computed nothing.
            most: Tokens at most.
        """
        if request.mm_features or request.prompt_embeds is not None:
            return None
        hashes = request.block_hashes
        found = [
            end
            for number, hashed in self._hashed.items()
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
        self._remove(self._ended[blocks[0].block_id])
        self._pool.touch(blocks)
        for block in blocks:
            block.reset_hash()

    def copy(self, blocks: list[KVCacheBlock]) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """Take as many new blocks, to be copied to by the worker before anything else is computed.

        Args:
            blocks: Of an end that `find` returned.

        Returns:
            Each block and its copy, with a reference more that vLLM drops once they are copied.
        """
        self._pool.touch(blocks)
        copies = self._pool.get_new_blocks(len(blocks))
        self._pool.touch(copies)
        return list(zip(blocks, copies, strict=True))

    def _forget(self, end: Ended, _: KVCacheBlock) -> None:
        """One of its blocks is another request's now."""
        if self._ended.get(end.blocks[0].block_id) is end:
            self._remove(end)

    def _remove(self, end: Ended) -> None:
        del self._ended[end.blocks[0].block_id]
        number = end.num_tokens // self._block_size
        hashed = self._hashed[number]
        hashed[end.whole].remove(end)
        if not hashed[end.whole]:
            del hashed[end.whole]
        if not hashed:
            del self._hashed[number]
