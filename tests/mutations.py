"""Wrong edits of the package, each with the test that finds it; `mutate.py` makes them."""

from __future__ import annotations

from dataclasses import dataclass

LAYER = "tests/unit/test_cpu_layer.py"
CONFIG = "tests/unit/test_config.py"
STATES = "tests/e2e/test_states.py::test_under_the_budget_as_vllm[nemotron_h]"
SHARED = "tests/e2e/test_shared_prefix.py"
DRAFTERS = "tests/e2e/test_drafters.py"
BUILT = "tests/unit/test_built_model.py"
TRIED = "tests/unit/test_transformers_rope.py"


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


MUTATIONS = [
    # The slowest is the first.
    Mutation(
        "a layer that repeats launches over the pages of another",
        "vllm_cascade/attention/gpu_layer.py",
        "tensors = (query, key, value, output, *pages.tensors,",
        "tensors = (query, key, value, output,",
        "tests/kernels/test_gpu_layer.py::test_a_layer_that_repeats_what_another_launched",
    ),
    Mutation(
        "a block of vLLM's that holds several of the cascade's, of which the last lack theirs",
        "vllm_cascade/kv_cache/manager.py",
        "return -(-self._layout.need(num_tokens) // self._parts)",
        "return max(1, self._layout.need(num_tokens) // self._parts)",
        STATES,
    ),
    Mutation(
        "a block of vLLM's that is not divided",
        "vllm_cascade/attention/backend.py",
        "return [kv_cache_spec.config.block_size]",
        "return [MultipleOf(16)]",
        STATES,
    ),
    Mutation(
        "CASCADE in a layer that attends in chunks",
        "patches/chunked_layers.py",
        "None if is_cascade(chosen) else chosen, {}",
        "chosen, per_kind",
        "tests/unit/test_patches.py::test_layers_of_chunked_attention_do_not_get_cascade",
    ),
    Mutation(
        "a place with a factor on queries that is left out",
        "vllm_cascade/attention/rope.py",
        "num_positions < floor_scale",
        "num_positions <= floor_scale",
        f"{BUILT}::test_a_temperature_without_rotation_is_left_out_where_it_is_one",
    ),
    Mutation(
        "a budget that reaches a place with a factor on queries",
        "vllm_cascade/support/resolved.py",
        "int(floor_scale) - 1",
        "int(floor_scale)",
        "tests/e2e/test_refusals.py::test_a_temperature_without_rotation_ends_the_budget",
    ),
    Mutation(
        "a place off by one",
        "kernels/cpu/attention.py",
        "own = slice(segment.first_place, num_keys)",
        "own = slice(max(segment.first_place - 1, 0), num_keys - (segment.first_place > 0))",
        f"{LAYER}::test_layer_equals_oracle[1500-paper]",
    ),
    Mutation(
        "a place off by one in decode",
        "vllm_cascade/attention/cpu_step.py",
        "self.singles.append((first_row, int(places[0]), blocks,",
        "self.singles.append((first_row, int(places[0]) - 1, blocks,",
        f"{LAYER}::test_layer_equals_oracle[40-paper]",
    ),
    Mutation(
        "single tokens whose attention is not scored",
        "vllm_cascade/attention/cpu_layer.py",
        "cpu_attention.decode(output, query, pages, batch, *how)",
        "cpu_attention.decode(output, query, pages, batch, *how[:2], None, *how[3:])",
        f"{LAYER}::test_layer_equals_oracle[40-paper]",
    ),
    Mutation(
        "a layer without its sink logits",
        "vllm_cascade/attention/cpu_layer.py",
        "sinks = None if self.sinks is None else self.sinks.float()",
        "sinks = None",
        f"{LAYER}::test_sink_logits_join_every_softmax",
    ),
    Mutation(
        "a soft cap that a model's layer is not given",
        "vllm_cascade/attention/impl.py",
        "self.soft_cap = float(logits_soft_cap or 0)",
        "self.soft_cap = 0.0",
        "tests/e2e/test_hybrid.py::test_under_the_budget_as_vllm[gemma2]",
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
        "a merge that is planned and not made",
        "vllm_cascade/attention/cpu_layer.py",
        "if wave.merge is not None:",
        "if wave.merge is not None and not wave.decodes:",
        f"{LAYER}::test_layer_equals_oracle[40-distinct-64]",
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
        "a default that looks at scores",
        "vllm_cascade/structure/options.py",
        '        "score_weight": 0.0,\n        "score_power"',
        '        "score_weight": 1.0,\n        "score_power"',
        f"{CONFIG}::test_a_policy_presets_its_knobs_and_a_set_knob_wins[distinct]",
    ),
    Mutation(
        "scores kept where nobody looks at them",
        "vllm_cascade/structure/config.py",
        "return self.chooses and self.score_weight > 0",
        "return self.chooses",
        f"{CONFIG}::test_scores_are_needed_only_where_they_choose[distinct]",
    ),
    Mutation(
        "a page that ends with its keys and values where scores follow them",
        "vllm_cascade/kv_cache/spec.py",
        "            padded = spec.unpadded_page_size_bytes + tail\n",
        "            padded = None\n",
        "tests/unit/test_spec.py::test_a_page_is_vllms_own_unless_something_is_behind_it",
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
        "FlashAttention-3 asked for heads that it does not take",
        "vllm_cascade/attention/gpu_workspace.py",
        " or shape.head_size > FLASH_MAX_HEAD_SIZE:",
        ":",
        "tests/unit/test_flash_attention.py::test_what_it_takes",
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
        "scores that do not decay between chunks",
        "vllm_cascade/attention/cpu_step.py",
        "carry = config.score_decay ** (",
        "carry = 1.0 ** (",
        f"{LAYER}::test_layer_equals_oracle[40-paper-16-0.999]",
    ),
    Mutation(
        "a last sub-cache that never drops",
        "vllm_cascade/structure/layout.py",
        "del caches[-1][: max(0, len(caches[-1]) - sizes[-1])]",
        "pass",
        f"{LAYER}::test_every_boundary_is_seen",
    ),
    Mutation(
        "survivors in the second half of their group's blocks",
        "vllm_cascade/structure/layout.py",
        "older += leaving[: blocks // 2]",
        "older += leaving[blocks // 2 :]",
        f"{LAYER}::test_every_boundary_is_seen",
    ),
    Mutation(
        "a merge one stride late",
        "vllm_cascade/structure/layout.py",
        "while len(cache) >= size + blocks:",
        "while len(cache) > size + blocks:",
        f"{LAYER}::test_every_boundary_is_seen",
    ),
    Mutation(
        "a level that gives its newest tokens away",
        "vllm_cascade/structure/levels.py",
        "count - newest * (level == 0)",
        "count",
        "tests/unit/test_layout.py::test_nothing_is_out_of_reach",
    ),
    Mutation(
        "levels that merge more pairs than there is too much",
        "vllm_cascade/structure/levels.py",
        "excess -= merging",
        "pass",
        "tests/unit/test_layout.py::test_levels_stay_under_the_bound",
    ),
    Mutation(
        "a kernel for aligned tensors launched with others",
        "kernels/launch.py",
        "return value.dtype, _is_aligned(value)",
        "return value.dtype",
        "tests/unit/test_launch.py::test_another_kind_is_looked_up[alignment]",
    ),
    Mutation(
        "a request that goes on after other last tokens",
        "vllm_cascade/kv_cache/ends.py",
        "and request.all_token_ids[number * self._block_size : end.num_tokens] == end.rest",
        "and bool(end.rest)",
        "tests/e2e/test_continuation.py::test_another_token_in_a_block_or_after_the_last"
        "[distinct-716-256]",
    ),
    Mutation(
        "a copy of a copy that is not made yet",
        "vllm_cascade/kv_cache/ends.py",
        "blocks = self._originals.get(blocks[0].block_id, blocks)",
        "blocks = list(blocks)",
        "tests/e2e/test_continuation.py::test_several_go_on_from_an_answer[distinct]",
    ),
    Mutation(
        "a prefix shared with a request that will move it",
        "vllm_cascade/kv_cache/prefix.py",
        "(request.resumable or longest > self.num_tokens)",
        "request.resumable",
        f"{SHARED}::test_whatever_the_others_do[large-pool]",
    ),
    Mutation(
        "a block shared that its holder will move",
        "vllm_cascade/kv_cache/continuation.py",
        "progress.copied = self._prefix.private(blocks)",
        "progress.copied = frozenset()",
        f"{SHARED}::test_a_holder_that_comes_to_the_boundary",
    ),
    Mutation(
        "a copy of a block that is not written yet",
        "vllm_cascade/kv_cache/prefix.py",
        "if block.block_id in self._unwritten)",
        "if block.is_null)",
        f"{SHARED}::test_whatever_the_others_do[large-pool]",
    ),
    Mutation(
        "a block that a boundary has written to found by its old hash",
        "vllm_cascade/kv_cache/prefix.py",
        "self._pool.evict_blocks({block.block_id for block in known",
        "(lambda _: None)({block.block_id for block in known",
        f"{SHARED}::test_whatever_the_others_do[small-pool]",
    ),
    Mutation(
        "a boundary run again with a token that was taken back",
        "vllm_cascade/kv_cache/manager.py",
        "any(part.merges for part in taken_back)",
        "False",
        "tests/e2e/test_sessions.py::test_tokens_taken_back[distinct-queued]",
    ),
    Mutation(
        "a draft that takes a boundary's token",
        "vllm_cascade/structure/layout.py",
        "self.end_after(least) - 1 - most",
        "self.end_after(least) - most",
        "tests/e2e/test_speculative.py::test_every_distance_from_a_boundary[in order]",
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
        "a prompt's last tokens taken for drafts",
        "patches/draft_boundaries.py",
        "if num_known <= 1 and self.cascade_has_late_drafts:",
        "if self.cascade_has_late_drafts:",
        "tests/unit/test_patches.py::test_drafts_leave_a_boundarys_token_alone",
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
        "a drafter that merges before its model does",
        "vllm_cascade/attention/cpu_step.py",
        "segment.end <= end - num_ahead",
        "segment.end <= end",
        f"{DRAFTERS}::test_the_model_itself_is_always_right[in order-fixed]",
    ),
    Mutation(
        "a drafter that passes a boundary before its model does",
        "vllm_cascade/attention/builder.py",
        "seq_lens = np.minimum(seq_lens, ends)",
        "pass",
        f"{DRAFTERS}::test_the_model_itself_is_always_right[in order-fixed]",
    ),
    Mutation(
        "a drafter that takes the sampled token for one of the model's",
        "vllm_cascade/attention/builder.py",
        "num_ahead = draft_index + self._num_sampled",
        "num_ahead = draft_index",
        f"{DRAFTERS}::test_the_model_itself_is_always_right[in order-fixed]",
    ),
    Mutation(
        "drafts behind an answer's last token counted among what is remembered of it",
        "vllm_cascade/kv_cache/ends.py",
        "return min(request.num_computed_tokens, request.num_tokens)",
        "return request.num_computed_tokens",
        "tests/e2e/test_speculative.py::test_what_is_remembered",
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
        "a layer without rotation that rotates",
        "vllm_cascade/attention/rope.py",
        "torch.cat((ones, torch.zeros_like(ones)), dim=-1)",
        "torch.cat((ones, ones), dim=-1)",
        f"{BUILT}::test_a_layer_without_rotation_gets_ones_and_zeros",
    ),
    Mutation(
        "a layer whose queries go with their place in the text",
        "vllm_cascade/attention/transformers_rope.py",
        "_neutral(pair), 0)",
        "_neutral(pair), FAR)",
        f"{TRIED}::test_what_does_more_is_refused[Warm-str]",
    ),
]
