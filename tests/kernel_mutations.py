"""Wrong edits of the kernels, each with the test that finds it; see `mutations`."""

from __future__ import annotations

from dataclasses import dataclass

LAYER = "tests/unit/test_cpu_layer.py"


@dataclass(frozen=True, slots=True)
class Mutation:
    """One wrong edit.

    Args:
        name: What goes wrong, in words.
        file: Where, in the package.
        right: Text that occurs there exactly once.
        wrong: What replaces it.
        test: The pytest node that must go red.
    """

    name: str
    file: str
    right: str
    wrong: str
    test: str


KERNEL_MUTATIONS = [
    Mutation(
        "a place off by one",
        "kernels/cpu/attention.py",
        "own = slice(segment.first_place, num_keys)",
        "own = slice(max(segment.first_place - 1, 0), num_keys - (segment.first_place > 0))",
        f"{LAYER}::test_layer_equals_oracle[1500-paper]",
    ),
    Mutation(
        "a soft cap that is left out where no scores are kept",
        "kernels/cpu/attention.py",
        "if scoring is None and sinks is None and not soft_cap:",
        "if scoring is None and sinks is None:",
        f"{LAYER}::test_a_soft_cap_bounds_every_logit[distinct]",
    ),
    Mutation(
        "a soft cap that a single token leaves out",
        "kernels/cpu/attention.py",
        "    _cap_(logits, soft_cap)",
        "    _cap_(logits, 0.0)",
        "tests/unit/test_softmax.py::test_of_a_single_token",
    ),
    Mutation(
        "a soft cap on the sinks' logits too",
        "kernels/cpu/attention.py",
        "torch.sigmoid(logits.logsumexp(-1) - sinks)",
        "torch.sigmoid(logits.logsumexp(-1) - 2.0 * torch.tanh(sinks / 2.0))",
        "tests/unit/test_softmax.py::test_of_a_chunk",
    ),
    Mutation(
        "a soft cap that paged decode leaves out",
        "kernels/decode/split.py",
        "if SOFT_CAP > 0:",
        "if SOFT_CAP < 0:",
        "tests/kernels/test_paged_decode.py::test_sinks_join_the_denominator",
    ),
    Mutation(
        "a soft cap that prefill leaves out",
        "kernels/prefill/attention.py",
        "if SOFT_CAP > 0:",
        "if SOFT_CAP < 0:",
        "tests/kernels/test_scored_prefill.py::test_capped_attention",
    ),
    Mutation(
        "a soft cap without the score's power",
        "kernels/prefill/scores.py",
        "SOFT_CAP=soft_cap * power,",
        "SOFT_CAP=soft_cap,",
        "tests/kernels/test_scored_prefill.py::test_scores_of_capped_attention",
    ),
    Mutation(
        "a stale score kept in a new token's slot",
        "kernels/cpu/attention.py",
        "old.masked_fill_(new[:, None], 0) + gained",
        "old.nan_to_num_(nan=1.0) + gained",
        f"{LAYER}::test_layer_equals_oracle[40-paper]",
    ),
    Mutation(
        "survivors in the wrong order",
        "kernels/cpu/merge.py",
        "return best.sort(dim=-1).values",
        "return best",
        f"{LAYER}::test_every_boundary_is_seen",
    ),
    Mutation(
        "a tie that goes to the older",
        "kernels/cpu/merge.py",
        "worth.argsort(dim=-1, stable=True)[..., half:]",
        "worth.argsort(dim=-1, stable=True, descending=True)[..., :half]",
        f"{LAYER}::test_every_boundary_is_seen",
    ),
    Mutation(
        "heads that share one selection",
        "kernels/cpu/merge.py",
        "    # [num_groups, num_kv_heads, tokens / 2] positions within the group\n",
        "    kept = kept[:, :1].expand_as(kept)\n",
        f"{LAYER}::test_every_boundary_is_seen",
    ),
    Mutation(
        "scores summed over queries before the heads are combined",
        "kernels/cpu/attention.py",
        "amounts = scoring.amounts(probs)\n"
        "                gained[head, :seen] += torch.mv(amounts.t(), segment.weights[first:last])",
        "raised = scoring._raise(probs)\n"
        "                weights = segment.weights[first:last]\n"
        "                gained[head, :seen] += torch.matmul(weights, raised).amax(0)",
        f"{LAYER}::test_every_boundary_is_seen",
    ),
    Mutation(
        "distinctiveness against the mean of the leaving group",
        "kernels/cpu/merge.py",
        "mean = means[batch.group_request]",
        "mean = unit(unit(kv[..., part]).mean(2))",
        f"{LAYER}::test_every_boundary_is_seen",
    ),
    Mutation(
        "a mean over all places",
        "kernels/cpu/merge.py",
        "place = place[place % MEAN_PERIOD < MEAN_RUN]",
        "place = place[place % MEAN_PERIOD < MEAN_PERIOD]",
        f"{LAYER}::test_every_boundary_is_seen",
    ),
    Mutation(
        "a value that is not looked at",
        "kernels/cpu/merge.py",
        "(weights.value, slice(head_size, None)),",
        "(0.0, slice(head_size, None)),",
        f"{LAYER}::test_layer_equals_oracle[1500-distinct-64]",
    ),
    Mutation(
        "a query that sees the next key",
        "kernels/cpu/attention.py",
        "dtype=torch.bool).tril(num_keys - num_queries)",
        "dtype=torch.bool).tril(num_keys - num_queries + 1)",
        f"{LAYER}::test_layer_equals_oracle[40-distinct-64]",
    ),
    Mutation(
        "sums of an earlier boundary kept",
        "kernels/merge/groups.py",
        "tl.store(sums_ptr + row * ROW + at, tl.zeros([TILE], tl.int64), mask=at < ROW)",
        "pass",
        "tests/kernels/test_compaction.py::test_counters",
    ),
    Mutation(
        "own tokens missing from the sums",
        "kernels/prefill/tiles.py",
        "slot, token, mask=valid)\n        if (SUM_KEYS or SUM_VALUES) and summed:",
        "slot, token, mask=valid)\n        if (SUM_KEYS or SUM_VALUES) and first_head < 0:",
        "tests/kernels/test_prepared_prefill.py::test_one_kind_of_vector_is_summed",
    ),
    Mutation(
        "own keys that skip the round trip through FP8",
        "kernels/primitives.py",
        "        if scale is not None:\n            first, second = first.to(tl.float32) * scale,",
        "        if scale is not None and plain is not None:\n"
        "            first = tl.load(source[:, None] + pair[None, :], mask=inside, other=0.0)\n"
        "            second = tl.load(source[:, None] + HALF + pair, mask=inside, other=0.0)\n"
        "        elif scale is not None:\n"
        "            first, second = first.to(tl.float32) * scale,",
        "tests/kernels/test_fp8.py::test_a_prompt_may_be_cut_anywhere",
    ),
    Mutation(
        "own values that skip the round trip through FP8",
        "kernels/prefill/tiles.py",
        "            value = to_e4m3(value, value_scale)\n"
        "            used = (value * value_scale).to(value_out_ptr.dtype.element_ty)\n",
        "            value = to_e4m3(value, value_scale)\n",
        "tests/kernels/test_fp8.py::test_a_prompt_may_be_cut_anywhere",
    ),
    Mutation(
        "a scale of values that decode forgets",
        "kernels/decode/split.py",
        "        attended *= load_scale(value_scale_ptr, kv_head, value_scale_stride)\n",
        "        pass\n",
        "tests/kernels/test_fp8.py::test_a_prompt_may_be_cut_anywhere",
    ),
    Mutation(
        "a token that sees the drafts behind it",
        "kernels/decode/split.py",
        "            seen = valid[:, None] & (key_place[:, None] <= own_place[None, :])\n",
        "            seen = valid[:, None] & (own_place[None, :] >= 0)\n",
        "tests/kernels/test_paged_decode.py::test_tokens_with_drafts_load_keys_together",
    ),
    Mutation(
        "as many queries of wide heads as of others",
        "kernels/decode/launch_config.py",
        "(MAX_QUERIES if head_size <= 256 else MAX_WIDE_QUERIES)",
        "MAX_QUERIES",
        "tests/kernels/test_wide_heads.py::test_few_queries_load_keys_together",
    ),
    Mutation(
        "padding rows that keep another request's values",
        "kernels/prefill/workspace.py",
        "written = valid | ((place >= num_keys) & (place < num_keys + PADDING))",
        "written = valid",
        "tests/kernels/test_prepared_prefill.py::test_one_kind_of_vector_is_summed",
    ),
    Mutation(
        "a kernel for aligned tensors launched with others",
        "kernels/launch.py",
        "return value.dtype, _is_aligned(value)",
        "return value.dtype",
        "tests/unit/test_launch.py::test_another_kind_is_looked_up[alignment]",
    ),
    Mutation(
        "a late draft that is written",
        "kernels/block_tables.py",
        "slot = tl.where(is_late, -1, slot)",
        "slot = tl.where(is_late & (slot < 0), -1, slot)",
        "tests/kernels/test_gpu_layer.py::test_drafts_across_boundaries",
    ),
    Mutation(
        "a late draft that is not rejected",
        "kernels/block_tables.py",
        "is_late = (number > 0) & (number >= _num_together(first, first_end, stride))",
        "is_late = (number > 0) & (number > _num_together(first, first_end, stride))",
        "tests/kernels/test_block_tables.py::test_resolved_as_by_hand[paper]",
    ),
    Mutation(
        "queries of drafts turned to another place than the last one's",
        "kernels/decode/split.py",
        "back = query_first * back_cos + query_second * back_sin",
        "back = query_first * back_cos - query_second * back_sin",
        "tests/kernels/test_paged_decode.py::test_tokens_with_drafts_load_keys_together",
    ),
    Mutation(
        "queries of drafts scaled by YaRN's factor twice",
        "kernels/decode/split.py",
        "        back_cos /= unit\n        back_sin /= unit\n",
        "",
        "tests/kernels/test_paged_decode.py::test_tokens_with_drafts_load_keys_together",
    ),
    Mutation(
        "a copied block without its scores",
        "kernels/pages.py",
        "tail[target] = tail[source]",
        "pass",
        "tests/e2e/test_continuation.py::test_many_go_on_from_a_prompt[blend]",
    ),
    Mutation(
        "a sink in a decoded output but not in its scores",
        "kernels/decode/combine.py",
        "norm = _join(lse_at, active, sinks_ptr, member, SPLITS)",
        "norm = _join(lse_at, active, None, member, SPLITS)",
        "tests/kernels/test_paged_decode.py::test_sinks_join_the_denominator",
    ),
    Mutation(
        "a sink in a chunk's output but not in its log-sum-exp",
        "kernels/prefill/attention.py",
        "        highest = higher\n    out = attended / total[:, None]",
        "    out = attended / total[:, None]",
        "tests/kernels/test_scored_prefill.py::test_attention",
    ),
    Mutation(
        "boundaries that merge once all waves of a round are prepared",
        "vllm_cascade/attention/gpu_layer.py",
        """            )
            if launch.merges is not None and not""",
        """            )
        for launch in each.launches:
            if launch.merges is not None and not""",
        "tests/kernels/test_rounds.py::test_answers_and_kept_tokens_are_those_of_waves_alone[elastic]",
    ),
    Mutation(
        "waves with scores that attend at once",
        "vllm_cascade/attention/gpu_step.py",
        "room = 0 if self.layout.config.needs_scores else self.max_keys",
        "room = self.max_keys",
        "tests/kernels/test_rounds.py::test_what_keeps_a_wave_alone",
    ),
    Mutation(
        "a launch that gathers as many keys as its first segment has",
        "vllm_cascade/attention/gpu_step.py",
        "max_prefix_len=max(cut.place for cut in part),",
        "max_prefix_len=part[0].place,",
        "tests/kernels/test_rounds.py::test_waves_take_rows_of_their_own",
    ),
]
