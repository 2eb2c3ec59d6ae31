"""Lets copies of blocks take along what a cascade's pages hold behind keys and values."""

from __future__ import annotations

import functools
import sys
from typing import Any

from vllm_cascade.patches.record import Patch

NAME = "copy_kv_cache_blocks_inplace"
# Bytes of a layer that are copied at a time. The copy takes as much memory again for the moment.
PIECE = 64 << 20
# These modules import the function by name, so it has to be replaced in them too.
RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")


def install() -> None:
    """Wrap vLLM's copying of blocks within a worker."""
    from vllm.v1.worker import utils

    original = getattr(utils, NAME)

    @functools.wraps(original)
    def copy(kv_caches: Any, num_blocks: int, kv_cache_block_copies: Any) -> None:
        from vllm_cascade.attention.impl import CascadeImpl
        from vllm_cascade.kernels.pages import copy_tails

        pages = CascadeImpl.pages_in(kv_caches)
        if not pages or not kv_cache_block_copies:
            original(kv_caches, num_blocks, kv_cache_block_copies)
            return
        # Copy in pieces: many requests may go on in one step, each from a full cache. The order is
        # free, because no block is copied both to and from.
        size = max(1, PIECE // max(each.kv.stride(0) * each.kv.element_size() for each in pages))
        for first in range(0, len(kv_cache_block_copies), size):
            original(kv_caches, num_blocks, kv_cache_block_copies[first : first + size])
        copy_tails(pages, kv_cache_block_copies)

    for module in (utils, *filter(None, map(sys.modules.get, RUNNERS))):
        setattr(module, NAME, copy)


PATCH = Patch(
    name="whole_page_copies",
    target=f"vllm.v1.worker.utils.{NAME}",
    signature="(kv_caches, num_blocks, kv_cache_block_copies)",
    symptom=(
        "Unless the pages of all layers of a block lie side by side, its keys and values alone are "
        "copied: the scores in the padded tail of each page would stay behind"
    ),
    removal="vLLM copies the padding of pages",
    install=install,
)
