"""The size of a page, and that no page is stretched over what is behind its keys and values."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_cascade.kv_cache.spec import CascadeSpec
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve
from vllm_cascade.support.unsupported import UnsupportedError


def test_pages_stretched_to_those_of_other_layers_are_refused():
    full = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)

    def spec_of(**options):
        config = resolve(
            CascadeOptions.parse(options), block_size=16, max_model_len=9000, position_limit=4096
        )
        return CascadeSpec.of(full, config)

    for spec in (spec_of(), spec_of(policy="blend"), spec_of(trace_tokens=True)):
        assert replace(spec) == spec
        stretched = spec.page_size_bytes + 64
        if spec.page_size_padded is None:
            # Nothing is behind keys and values, so that it does not matter where a page ends.
            assert replace(spec, page_size_padded=stretched).page_size_bytes == stretched
            # Three of the cascade's blocks lie in one of vLLM's.
            assert replace(spec, block_size=48).max_blocks == -(-spec.max_blocks // 3)
            continue
        with pytest.raises(UnsupportedError, match="behind keys and values would be read as such"):
            replace(spec, block_size=32)
        with pytest.raises(UnsupportedError, match="behind keys and values would be read as such"):
            replace(spec, page_size_padded=stretched)


@pytest.mark.parametrize(
    ("options", "longest", "tail"),
    [
        ({}, 9000, 0),
        ({"policy": "window"}, 9000, 0),
        ({"trace_tokens": True}, 9000, 4),
        ({"policy": "blend"}, 9000, 4),
        ({"policy": "paper"}, 9000, 4),
        ({"policy": "blend", "trace_tokens": True}, 9000, 8),
        ({"policy": "blend", "score_weight": 0}, 9000, 0),
        # Nothing ever has to go, so nothing is scored.
        ({"policy": "blend", "cache_tokens": 1024}, 1000, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_page_is_vllms_own_unless_something_is_behind_it(options, longest, tail, dtype):
    from vllm_cascade.kv_cache.spec import CascadeSpec

    config = resolve(
        CascadeOptions.parse(options), block_size=16, max_model_len=longest, position_limit=4096
    )
    full = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=dtype)
    spec = CascadeSpec.of(full, config)
    assert spec.unpadded_page_size_bytes == full.page_size_bytes
    assert spec.page_size_bytes == full.page_size_bytes + 2 * 16 * tail
    assert (spec.page_size_padded is None) == (tail == 0)
