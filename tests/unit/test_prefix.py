"""What requests that begin alike share, on vLLM's own pool and hashes."""

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from vllm_cascade.kv_cache.prefix import Prefix

BLOCK = 16


def test_a_block_waits_for_its_hash():
    """Where a drafter reads a token ahead, vLLM hashes a block together with the next token."""
    init_none_hash(sha256)
    pool = BlockPool(num_gpu_blocks=9, enable_caching=True, hash_block_size=BLOCK)
    request = Request(
        request_id="one",
        prompt_token_ids=list(range(4 * BLOCK)),
        sampling_params=SamplingParams(max_tokens=8),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )
    prefix = Prefix(pool, BLOCK, group_id=0, num_tokens=8 * BLOCK, is_bounded=True)
    row, last = pool.get_new_blocks(4), request.block_hashes.pop()
    assert prefix.add(request, row, 0, 4 * BLOCK) == 3
    assert prefix.find(request, 4 * BLOCK) == row[:3]
    request.block_hashes.append(last)
    assert prefix.find(request, 4 * BLOCK) == row[:3]
    assert prefix.add(request, row, 3, 4 * BLOCK) == 4
    assert prefix.find(request, 4 * BLOCK) == row
