"""The scheduler's side of the cascade: a request's row grows to R blocks and never shrinks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager

from vllm_cascade.kv_cache.continuation import Continuation, Progress
from vllm_cascade.kv_cache.ends import Ends, num_known
from vllm_cascade.kv_cache.prefix import Prefix
from vllm_cascade.kv_cache.spec import CascadeSpec
from vllm_cascade.structure.accounting import computed_tokens, tokens_evicted
from vllm_cascade.structure.layout import build_layout

if TYPE_CHECKING:
    from vllm.v1.request import Request


class CascadeManager(CircularBufferManager):
    """Gives a request `CascadeSpec.need` blocks, which the request keeps until it ends.

    Blocks are recycled inside the row, so no block is freed or moved before the request ends. With
    prefix caching a later request may go on from what an earlier one computed (`Continuation`).
    vLLM admits a waiting request if its whole prompt fits into the free blocks of the moment. This
    manager counts the blocks that admitted prompts have yet to take as taken: so a pool with room
    for k budgets runs k long requests and preempts none.

    Args:
        kv_cache_spec: The spec of CASCADE's layers, which carries the configuration.
        args: As of vLLM's managers.
        kwargs: As of vLLM's managers.
    """

    def __init__(self, kv_cache_spec: CascadeSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self._layout = build_layout(kv_cache_spec.config)
        self._parts = kv_cache_spec.parts
        # Request -> what is known of it, from vLLM's first call for the request until the request
        # gives its blocks back.
        self._progress: defaultdict[str, Progress] = defaultdict(Progress)
        config = kv_cache_spec.config
        pool, size, group_id = self.block_pool, self.block_size, self.kv_cache_group_id
        num_unmoved = 0 if config.needs_scores else self._layout.num_unmoved
        is_bounded = num_unmoved < config.max_model_len
        self._prefix = Prefix(pool, size, group_id, num_unmoved, is_bounded=is_bounded)
        self._ends = Ends(pool, size, group_id)
        least_copied = -(-config.cache_tokens // 4)
        self._continuation = Continuation(self._ends, self._prefix, size, least_copied)

    def continued_by(self, request: Request, most: int) -> tuple[list[KVCacheBlock], int]:
        """Find where a waiting request can go on.

        Args:
            request: A request that has computed nothing.
            most: Most tokens that may be taken as computed.

        Returns:
            Blocks to share, to take over or to copy, and the number of tokens computed in them; no
            blocks and 0 if the request has to begin at the beginning.
        """
        return self._continuation.find(
            request,
            self._progress[request.request_id],
            most,
            self.block_pool.get_num_free_blocks(),
            self._need(request.num_tokens),
        )

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Count the blocks that a request lacks of `CascadeSpec.need`, which never passes R.

        Args:
            request_id: The request.
            num_tokens: Tokens that the request will have computed, or all of its prompt.
            new_computed_blocks: Blocks from `continued_by`, to be shared, taken over or copied.
            total_computed_tokens: Not used.
            num_local_computed_tokens: Not used.
            num_tokens_main_model: Not used.
            apply_admission_cap: Whether vLLM asks to admit the request with its whole prompt.
                Then the blocks that earlier prompts have yet to take count too.
            prefill_end: Not used.

        Returns:
            Blocks that have to be free.
        """
        progress = self._progress[request_id]
        need = self._need(num_tokens)
        if progress.waits:
            return self.block_pool.get_num_free_blocks() + 1
        num_whole = len(new_computed_blocks) - len(progress.copied)
        missing = max(0, need - self._num_held(request_id) - num_whole)
        # Blocks that nobody holds are free no longer; originals, until the worker has copied them.
        missing += sum(block.ref_cnt == 0 for block in new_computed_blocks)
        if apply_admission_cap:
            progress.promised = need
            missing += self._num_promised(besides=request_id)
        return missing

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Lengthen a request's row to `CascadeSpec.need` blocks; vLLM's has all tokens' blocks."""
        progress, row = self._progress[request_id], self.req_to_blocks[request_id]
        missing = self._need(num_tokens) - len(row)
        blocks = self.block_pool.get_new_blocks(missing) if missing > 0 else []
        row.extend(blocks)
        if progress.num_tokens <= self._prefix.num_tokens < num_tokens_main_model:
            self._pending_cow_copies += self._prefix.leave(row, self._num_spare())
        progress.num_tokens = num_tokens_main_model
        return blocks

    def most_together(self, least: int, most: int) -> int:
        """Count the tokens of a request that a step with drafts may compute (`Layout`)."""
        return self._layout.most_together(least, most)

    def cannot_take_back(self, request_id: str, num_tokens: int) -> bool:
        """Whether a request's row is no longer what its first tokens alone would have made it.

        Args:
            request_id: The request.
            num_tokens: Tokens that stay computed; all later ones are computed again.

        Returns:
            Whether one of the later tokens has had a part in a merge, or in attention scores.
        """
        progress = self._progress.get(request_id)
        if progress is None or progress.num_tokens <= num_tokens:
            return False
        taken_back = self._layout.segments(num_tokens, progress.num_tokens)
        return self._layout.config.needs_scores or any(part.merges for part in taken_back)

    def num_evicted(self, num_prompt_tokens: int, num_output_tokens: int) -> int:
        """Count the tokens that a request no longer holds when it ends.

        Args:
            num_prompt_tokens: Tokens of its prompt.
            num_output_tokens: Tokens sampled; the last one has not been computed.

        Returns:
            Tokens evicted, per layer and KV head.
        """
        num_tokens = computed_tokens(num_prompt_tokens, num_output_tokens)
        return tokens_evicted(self._layout.config, num_tokens)

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        """Refuse KV from a connector, for which vLLM's managers take blocks.

        Raises:
            NotImplementedError: A connector has tokens for the request.
        """
        if num_external_computed_tokens:
            raise NotImplementedError(
                "CASCADE cannot take KV from a connector: its pages hold what survived, not every "
                "token. Start without --kv-transfer-config"
            )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Begin a row with blocks shared, taken over or copied, where vLLM shares them all.

        Args:
            request_id: The request.
            new_computed_blocks: Blocks from `continued_by`.
            num_local_computed_tokens: Tokens computed in these blocks.
            num_external_computed_tokens: Not used.
        """
        if new_computed_blocks:
            blocks, copies = self._continuation.begin(
                self._progress[request_id], list(new_computed_blocks), num_local_computed_tokens
            )
            self._pending_cow_copies += copies
            self.req_to_blocks[request_id].extend(blocks)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Let others find full blocks as vLLM does, and copy a prompt shortly before its end.

        vLLM calls this method in each step, and only with prefix caching.

        Args:
            request: A request that the step computes.
            num_tokens: Tokens that the request will have computed after the step.
            retention_interval: Not used.
            replay_boundaries: Not used.
        """
        progress = self._progress[request.request_id]
        progress.request = request
        row = self.req_to_blocks[request.request_id]
        if self._continuation.is_asked and progress.num_tokens <= self._prefix.num_tokens:
            progress.num_known = self._prefix.add(request, row, progress.num_known, num_tokens)
        num_copied = self._continuation.wants_copy(progress, num_tokens)
        if not num_copied:
            return
        blocks = row[: self._need(num_copied)]
        if len(blocks) <= self._num_spare():
            self._pending_cow_copies += self._continuation.copy_prompt(progress, num_copied, blocks)

    def take_pending_cow_copies(self) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """Hand the step's copies to the worker as vLLM does, and note that they will be made."""
        self._ends.copies_are_made()
        self._prefix.steps_on()
        return super().take_pending_cow_copies()

    def free(self, request_id: str) -> None:
        """Free a request's blocks as an end to go on from, where vLLM frees each for itself."""
        progress = self._progress.get(request_id)
        request = None if progress is None else progress.request
        if request is not None and self.cannot_take_back(request_id, num_known(request)):
            progress = None
        blocks = self.pop_blocks_for_free(request_id)
        if not self._continuation.end(progress, blocks):
            self.block_pool.free_blocks(reversed(blocks))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Take a request's blocks out of its row as vLLM does, and forget its progress."""
        self._progress.pop(request_id, None)
        blocks = super().pop_blocks_for_free(request_id)
        self._prefix.free(blocks)
        return blocks

    def _need(self, num_tokens: int) -> int:
        """As `CascadeSpec.need`, which is too slow for each request in each step."""
        return -(-self._layout.need(num_tokens) // self._parts)

    def _num_promised(self, besides: str | None = None) -> int:
        """Blocks that admitted prompts have yet to take, but for the request `besides`."""
        return sum(
            max(0, progress.promised - self._num_held(name))
            for name, progress in self._progress.items()
            if name != besides and self._num_held(name)
        )

    def _num_spare(self) -> int:
        """Free blocks that copies may take: nobody else will need them in this step."""
        # Each running request may take one more block before this step is scheduled.
        num_wanted = self._num_promised() + len(self.req_to_blocks)
        return self.block_pool.get_num_free_blocks() - num_wanted

    def _num_held(self, request_id: str) -> int:
        return len(self.req_to_blocks.get(request_id, ()))
