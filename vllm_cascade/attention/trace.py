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
    """The block-table rows that an engine's steps were given, to read their pages later.

    Args:
        layout: The cascade's structure.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        # First block of a request -> its blocks and number of tokens when last seen. The request
        # seen last comes last.
        self.requests: dict[int, tuple[npt.NDArray[np.int32], int]] = {}

    def note(self, block_table: npt.NDArray[np.int32], seq_lens: npt.NDArray[np.int64]) -> None:
        """Note one step's requests.

        Args:
            block_table: [num_requests, width] int32 block ids of each request's row.
            seq_lens: [num_requests] int64 tokens of each request once the step is done.
        """
        for row, num_tokens in zip(block_table, seq_lens.tolist(), strict=True):
            # vLLM never hands out block 0; the rows of dummy runs hold nothing else.
            if num_tokens and row[0]:
                blocks = row[: self.layout.need(num_tokens)].copy()
                self.requests.pop(int(blocks[0]), None)
                self.requests[int(blocks[0])] = (blocks, num_tokens)


def kept_in(
    pages: Pages, layout: Layout, row: npt.NDArray[np.int32], num_tokens: int
) -> torch.Tensor:
    """Read the tokens that one request holds in one layer.

    Args:
        pages: The layer's pages, with token indices.
        layout: The cascade's structure.
        row: [num_blocks] block ids of the request's block-table row.
        num_tokens: Tokens that the request has computed.

    Returns:
        [num_kv_heads, num_kept] int32 token indices in logical order.
    """
    assert pages.token is not None
    entries, places = layout.held(num_tokens)
    held = pages.token[torch.from_numpy(row[entries].astype(np.int64))]
    return held.transpose(0, 1).flatten(1)[:, :places]


class WorkerExtension:
    """Adds `kept_tokens` to vLLM's workers."""

    model_runner: Any

    def kept_tokens(self) -> list[dict[str, Any]]:
        """List the kept tokens of each request none of whose blocks a later request has.

        Returns:
            A dictionary for each request, the request seen last at the end. ``num_tokens`` is the
            number of tokens computed. ``layers`` maps a layer's name to [num_kv_heads][num_kept]
            token indices in logical order, for the heads of this rank.

        Raises:
            ValueError: The engine runs without ``trace_tokens``, or its CASCADE layers are of
                several KV cache groups.
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
        if len({id(impl.seen) for impl in impls.values()}) > 1:
            raise ValueError(
                "vLLM has divided the model's full-attention layers into several groups with rows "
                "of their own, and the pages of one group alone can be read"
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
