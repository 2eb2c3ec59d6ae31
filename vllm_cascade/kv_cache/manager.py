"""The scheduler's side of the cascade: rows that grow to R blocks and never shrink."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager

from vllm_cascade.kv_cache.continuation import Continuations
from vllm_cascade.kv_cache.spec import CascadeSpec
from vllm_cascade.structure.layout import build_layout

if TYPE_CHECKING:
    from vllm.v1.request import Request

# The last tokens of a prompt, taken to be the request's own question. What stands before them may
# be a text that other requests have too, and is worth a copy.
QUESTION_TOKENS = 256


class CascadeManager(CircularBufferManager):
    """Hands a request need(tokens) blocks and lets it keep them until it ends.

    Blocks are recycled inside the row, so nothing is freed, moved or shared on the way. With prefix
    caching a later request may go on where this one ended (`Continuations`). vLLM
    admits a waiting request if its whole prompt fits the free blocks of the moment; blocks that
    admitted prompts have yet to take are counted here as taken, so that a pool with room for k
    budgets runs k long requests and preempts none.
    """

    def __init__(self, kv_cache_spec: CascadeSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self._layout = build_layout(kv_cache_spec.config)
        # Request -> blocks that its prompt will hold, as promised on admission.
        self._promised: dict[str, int] = {}
        self._running: dict[str, Request] = {}
        self._continuations = Continuations(
            self.block_pool, self.block_size, self.kv_cache_group_id
        )
        # Requests that go on from a copy.
        self._copying: set[str] = set()
        # Requests that took blocks over -> tokens these stand for, until their first step.
        self._taken: dict[str, int] = {}
        # Requests of whose prompt there is a copy.
        self._saved: set[str] = set()
        # Whether vLLM asks where requests can go on. False for models with other caches beside this
        # one: their patch does not ask.
        self._is_asked = False

    def continued_by(self, request: Request, most: int) -> tuple[list[KVCacheBlock], int]:
        """Where a request can go on.

        Args:
            request: A request that has computed nothing.
            most: Tokens that may be taken as computed.

        Returns:
            Blocks for its row, and the tokens they were computed from; none and 0 if it has to
            begin at the beginning.
        """
        self._is_asked = True
        self._copying.discard(request.request_id)
        end = self._continuations.find(request, most)
        if end is None:
            return [], 0
        num_free = sum(block.ref_cnt == 0 for block in end.blocks)
        need = self._layout.need(request.num_tokens)
        if end.is_prompt and num_free + need <= self.block_pool.get_num_free_blocks():
            self._copying.add(request.request_id)
        elif num_free < len(end.blocks):
            # Another request is about to get a copy.
            return [], 0
        return end.blocks, end.num_tokens

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
        need = self._layout.need(num_tokens)
        missing = max(0, need - self._num_held(request_id))
        if request_id in self._copying:
            # What is copied is not free meanwhile.
            missing += sum(block.ref_cnt == 0 for block in new_computed_blocks)
        if apply_admission_cap:
            self._promised[request_id] = need
            missing += self._num_promised(besides=request_id)
        return missing

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        missing = self._layout.need(num_tokens) - self._num_held(request_id)
        if missing <= 0:
            return []
        blocks = self._continuations.new_blocks(missing)
        self.req_to_blocks[request_id].extend(blocks)
        return blocks

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
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
        blocks = list(new_computed_blocks)
        if not blocks:
            return
        if request_id in self._copying:
            self._copying.remove(request_id)
            copied = self._continuations.copy(blocks)
            self._pending_cow_copies += copied
            blocks = [copy for _, copy in copied]
        else:
            self._continuations.take(blocks)
            self._taken[request_id] = num_local_computed_tokens
        self.req_to_blocks[request_id].extend(blocks)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        # Called in each step with prefix caching, and only then.
        self._running[request.request_id] = request
        num_held = request.num_computed_tokens or self._taken.pop(request.request_id, 0)
        num_prompt = request.num_prompt_tokens
        # A copy costs as much whatever is in it: of little it would save too little.
        is_worth_it = self._is_asked and self._layout.config.cache_tokens <= 4 * num_held
        # This step leaves at most a question to compute: copy what is held before it runs.
        if is_worth_it and num_held < num_prompt < num_tokens + QUESTION_TOKENS:
            self._save(request, num_held)

    def take_pending_cow_copies(self) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        self._continuations.copies_are_made()
        return super().take_pending_cow_copies()

    def free(self, request_id: str) -> None:
        request = self._running.get(request_id)
        blocks = self.pop_blocks_for_free(request_id)
        has_ended = request is not None and request.is_finished() and self._is_asked
        if not has_ended or not self._continuations.keep(request, blocks):
            self.block_pool.free_blocks(reversed(blocks))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._promised.pop(request_id, None)
        self._running.pop(request_id, None)
        self._copying.discard(request_id)
        self._taken.pop(request_id, None)
        self._saved.discard(request_id)
        return super().pop_blocks_for_free(request_id)

    def _save(self, request: Request, num_tokens: int) -> None:
        """Copy what a request holds: once a request, and into spare blocks only."""
        name = request.request_id
        blocks = self.req_to_blocks[name][: self._layout.need(num_tokens)]
        # Until the end of this step; each request may take another block meanwhile.
        needed = len(blocks) + self._num_promised() + len(self.req_to_blocks)
        if name in self._saved or needed > self._continuations.num_unused:
            return
        self._saved.add(name)
        self._pending_cow_copies += self._continuations.save(request, num_tokens, blocks)

    def _num_promised(self, besides: str | None = None) -> int:
        """Blocks that admitted prompts have yet to take."""
        return sum(
            max(0, promised - self._num_held(name))
            for name, promised in self._promised.items()
            if name != besides and self._num_held(name)
        )

    def _num_held(self, request_id: str) -> int:
        return len(self.req_to_blocks.get(request_id, ()))
