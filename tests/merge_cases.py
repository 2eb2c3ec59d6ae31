"""Rows of pages of which some merge, for kernels and for what they are held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reference import compaction as reference
from vllm_cascade.kernels.merge.groups import make_scratch, merge_groups
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.segments import Merges
from vllm_cascade.kernels.weights import Weights

BOTH = Weights(1.0, 1.0, 0.0)
ALL = Weights(1.0, 1.0, 1.0)


@dataclass
class Case:
    """Rows of which some merge, over pages whose unused places hold NaN."""

    pages: Pages
    merges: Merges
    head_size: int
    window: int

    def run(self, weights: Weights = BOTH, max_rows: int | None = None, **options: object) -> Pages:
        """The pages after merging a copy of them."""
        pages = copy(self.pages)
        num_rows = len(self.merges.num_groups)
        group = self.merges.groups.shape[2] * pages.kv.shape[2]
        scratch = make_scratch(
            max_rows or num_rows,
            pages.kv.shape[1],
            self.head_size,
            pages.kv.device,
            max_group=group,
        )
        # What is left from before must not matter.
        scratch.values.fill_(torch.nan)
        scratch.sources.fill_(2**30)
        merge_groups(pages, self.merges, self.head_size, self.window, weights, scratch, **options)
        # For the next layer.
        assert not scratch.sums.any() and not scratch.finished.any()
        return pages

    def expected(self, weights: Weights = BOTH, counters: torch.Tensor | None = None) -> Pages:
        pages = copy(self.pages)
        reference.merge_groups(
            pages, self.merges, self.head_size, self.window, weights, counters=counters
        )
        return pages


def copy(pages: Pages) -> Pages:
    kv = pages.kv
    flat = torch.empty(0, dtype=kv.dtype, device=kv.device).set_(kv.untyped_storage()).clone()
    kv = flat.as_strided(kv.shape, kv.stride(), kv.storage_offset())
    whole = Pages.view(kv, True, True)
    score = None if pages.score is None else whole.score
    return Pages(kv, score, None if pages.token is None else whole.token)


def bits(pages: Pages) -> torch.Tensor:
    storage = pages.kv.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=pages.kv.device).set_(storage).cpu()


def make_case(
    device: torch.device,
    num_groups: list[int],
    *,
    block_size: int = 16,
    head_size: int = 16,
    num_kv_heads: int = 2,
    window: int = 16,
    dtype: torch.dtype = torch.float32,
    has_token: bool = True,
    structured: bool = False,
    has_score: bool = True,
    seed: int = 0,
) -> Case:
    """Rows with some groups each, a sink block before and a partly filled block after them.

    Structured keys and values are one channel each, and how often a channel occurs decides the
    order, so distinctiveness is far from a tie or exactly equal in any arithmetic.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    group_blocks = max(window, 2 * block_size) // block_size
    num_rows, max_groups = len(num_groups), max([*num_groups, 1]) + 1
    row_blocks = 1 + max_groups * group_blocks + 1
    num_blocks = num_rows * row_blocks + 3
    slots = num_kv_heads * block_size
    page_bytes = slots * (2 * head_size * dtype.itemsize + 8)
    pool = torch.full((num_blocks, page_bytes // dtype.itemsize), torch.nan, dtype=dtype)
    kv = pool.as_strided(
        (num_blocks, num_kv_heads, block_size, 2 * head_size),
        (pool.shape[1], block_size * 2 * head_size, 2 * head_size, 1),
    )
    pages = Pages.view(kv, True, True)
    assert pages.score is not None and pages.token is not None
    order = torch.randperm(num_blocks, generator=generator)[: num_rows * row_blocks]
    order = order.view(num_rows, row_blocks).int()
    counts = torch.tensor(num_groups, dtype=torch.int32)
    full = 1 + counts * group_blocks
    num_keys = full * block_size + torch.randint(block_size, (num_rows,), generator=generator)
    for row in range(num_rows):
        keys = int(num_keys[row])
        blocks = order[row, torch.arange(keys) // block_size].long()
        offsets = torch.arange(keys) % block_size
        kv[blocks, :, offsets] = randn(keys, num_kv_heads, 2 * head_size).to(dtype)
        # Means away from zero, and several scores alike.
        kv[blocks, :, offsets] += randn(2 * head_size).to(dtype)
        for part in (slice(head_size), slice(head_size, None)) if structured else ():
            likely = torch.arange(1, head_size + 1).float().square()
            channel = likely.multinomial(keys * num_kv_heads, True, generator=generator)
            key = torch.nn.functional.one_hot(channel, head_size).float()
            key *= torch.randint(0, 4, (len(channel), 1), generator=generator)
            kv[blocks, :, offsets, part] = key.view(keys, num_kv_heads, -1).to(dtype)
        score = randn(keys, num_kv_heads)
        pages.score[blocks, :, offsets] = (score * 8).round() / 8
        pages.token[blocks, :, offsets] = torch.arange(keys, dtype=torch.int32)[:, None]
    groups = order[:, 1:-1].reshape(num_rows, max_groups, group_blocks).clone()
    groups[torch.arange(max_groups) >= counts[:, None]] = 2**30
    table = order.clone()
    table[torch.arange(row_blocks) * block_size >= num_keys[:, None]] = 2**30
    pool = pool.to(device)
    kv = pool.as_strided(kv.shape, kv.stride())
    merges = Merges(groups, counts, table, num_keys.int())
    merges = Merges(*(getattr(merges, name).to(device) for name in Merges.__slots__))
    pages = Pages.view(kv, True, True)
    score, token = pages.score if has_score else None, pages.token if has_token else None
    return Case(Pages(pages.kv, score, token), merges, head_size, window)


def assert_same(got: Pages, expected: Pages) -> None:
    """The whole pool, poison, slack and all, to the bit."""
    assert torch.equal(bits(got), bits(expected))
