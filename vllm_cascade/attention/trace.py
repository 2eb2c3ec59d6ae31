"""Which tokens each layer and KV head kept, read from the engine's own pages.

Start the engine with the option ``trace_tokens`` and with
``worker_extension_cls="vllm_cascade.trace.WorkerExtension"``, then call
``llm.collective_rpc("kept_tokens")``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_cascade.kernels.pages import Pages
from vllm_cascade.structure.layout import Layout


class Seen:
    """The rows that an engine's steps were given, so that their pages can be read later.

    Args:
        layout: The cascade's structure.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        # First block of a request -> its blocks and its tokens when last seen, newest last.
        self.requests: dict[int, tuple[npt.NDArray[np.int32], int]] = {}

    def note(self, block_table: npt.NDArray[np.int32], seq_lens: npt.NDArray[np.int64]) -> None:
        """Take in one step.

        Args:
            block_table: [num_requests, width] block ids.
            seq_lens: [num_requests] tokens of each request once the step is done.
        """
        for row, num_tokens in zip(block_table, seq_lens.tolist(), strict=True):
            # Block 0 is never handed out; the rows of dummy runs consist of it.
            if num_tokens and row[0]:
                blocks = row[: self.layout.need(num_tokens)].copy()
                self.requests.pop(int(blocks[0]), None)
                self.requests[int(blocks[0])] = (blocks, num_tokens)


def kept_in(
    pages: Pages, layout: Layout, row: npt.NDArray[np.int32], num_tokens: int
) -> torch.Tensor:
    """Token indices that one request holds in one layer.

    Args:
        pages: The layer's pages, with token indices.
        layout: The cascade's structure.
        row: Block ids of the request's row.
        num_tokens: Tokens computed.

    Returns:
        [num_kv_heads, num_kept] int32 tensor in logical order.
    """
    assert pages.token is not None
    entries, places = layout.held(num_tokens)
    held = pages.token[torch.from_numpy(row[entries].astype(np.int64))]
    return held.transpose(0, 1).flatten(1)[:, :places]


class WorkerExtension:
    """Adds `kept_tokens` to vLLM's workers."""

    model_runner: Any

    def kept_tokens(self) -> list[dict[str, Any]]:
        """Kept tokens of the requests whose pages are still whole, the oldest first.

        Returns:
            Per request ``num_tokens`` (computed) and ``layers``: layer name to
            [num_kv_heads][num_kept] token indices in logical order, of this rank's heads.

        Raises:
            ValueError: The engine runs without ``trace_tokens``.
        """
        layers = self.model_runner.compilation_config.static_forward_context
        impls = {
            name: layer.impl
            for name, layer in layers.items()
            if getattr(getattr(layer, "impl", None), "seen", None) is not None
        }
        if not impls:
            raise ValueError(
                "the pages hold no token indices: start the engine with the cascade option "
                '"trace_tokens": true'
            )
        seen = next(iter(impls.values())).seen
        found, overwritten = [], set[int]()
        for row, num_tokens in reversed(seen.requests.values()):
            if overwritten.isdisjoint(row.tolist()):
                kept = {
                    name: kept_in(impl.pages, seen.layout, row, num_tokens).tolist()
                    for name, impl in impls.items()
                }
                found.append({"num_tokens": num_tokens, "layers": kept})
            overwritten.update(row.tolist())
        return found[::-1]
