"""What finished requests held, for a request that goes on where one of them ended.

A block of a cascade holds what survived all that came after it, so no two requests can share one.
But a request whose tokens begin with all those that a finished one computed, as a chat's next turn
does, can take over the blocks as they are. They count as free meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request


@dataclass(frozen=True, slots=True, eq=False)
class Ended:
    """Where a request ended.

    Args:
        num_tokens: Tokens it had computed.
        whole: vLLM's hash of those in whole blocks, which counts adapter and salt in.
        rest: The others.
        blocks: All that it held.
    """

    num_tokens: int
    whole: bytes
    rest: list[int]
    blocks: list[KVCacheBlock]


class Continuations:
    """The ends of requests whose blocks no other has taken yet.

    Args:
        block_pool: vLLM's pool.
        block_size: Tokens of a block that is hashed.
    """

    def __init__(self, block_pool: BlockPool, block_size: int) -> None:
        self._pool, self._block_size = block_pool, block_size
        # In the order in which the pool hands their blocks out again.
        self._ended: dict[int, Ended] = {}

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
        rest = list(request.all_token_ids[number * self._block_size : num_tokens])
        ended = Ended(num_tokens, request.block_hashes[number - 1], rest, blocks)
        self._ended[id(ended)] = ended
        self._pool.unpin_blocks(blocks, partial(self._forget, ended))
        return True

    def find(self, request: Request, most: int) -> Ended | None:
        """The longest end with which the tokens of a request begin, and after which more follow.

        Args:
            request: A request that has computed nothing.
            most: Tokens at most.
        """
        ends = (end for end in self._ended.values() if end.num_tokens <= most)
        return max(
            (end for end in ends if self._begins(request, end)),
            key=lambda end: end.num_tokens,
            default=None,
        )

    def take(self, blocks: list[KVCacheBlock]) -> None:
        """Hand over an end's blocks, which nobody else can take then.

        Args:
            blocks: Of an end that `find` returned.
        """
        # Blocks compare by what they hold of each other, without an end.
        end = next(end for end in self._ended.values() if end.blocks[0] is blocks[0])
        del self._ended[id(end)]
        self._pool.touch(blocks)

    def _begins(self, request: Request, end: Ended) -> bool:
        number = end.num_tokens // self._block_size
        if len(request.block_hashes) < number or request.block_hashes[number - 1] != end.whole:
            return False
        first = number * self._block_size
        same: bool = request.all_token_ids[first : end.num_tokens] == end.rest
        return same and not request.mm_features and request.prompt_embeds is None

    def _forget(self, end: Ended, _: KVCacheBlock) -> None:
        """One of its blocks is another request's now."""
        self._ended.pop(id(end), None)
