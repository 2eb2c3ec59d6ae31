"""Wrong edits of the package, each with the test that finds it; `mutate.py` makes them."""

from __future__ import annotations

from kernel_mutations import KERNEL_MUTATIONS, Mutation

LAYER = "tests/unit/test_cpu_layer.py"
CONFIG = "tests/unit/test_config.py"
STATES = "tests/e2e/test_states.py::test_under_the_budget_as_vllm[nemotron_h]"
SHARED = "tests/e2e/test_shared_prefix.py"
DRAFTERS = "tests/e2e/test_drafters.py"
BUILT = "tests/unit/test_built_model.py"
TRIED = "tests/unit/test_transformers_rope.py"

__all__ = ["BUILT", "MUTATIONS", "TRIED", "Mutation"]

MUTATIONS = [
    *KERNEL_MUTATIONS,
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
        "a merge that is planned and not made",
        "vllm_cascade/attention/cpu_layer.py",
        "if wave.merge is not None:",
        "if wave.merge is not None and not wave.decodes:",
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
        "FlashAttention-3 asked for heads that it does not take",
        "vllm_cascade/attention/gpu_workspace.py",
        " or shape.head_size > FLASH_MAX_HEAD_SIZE:",
        ":",
        "tests/unit/test_flash_attention.py::test_what_it_takes",
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
        "a prompt's last tokens taken for drafts",
        "patches/draft_boundaries.py",
        "if num_known <= 1 and self.cascade_has_late_drafts:",
        "if self.cascade_has_late_drafts:",
        "tests/unit/test_patches.py::test_drafts_leave_a_boundarys_token_alone",
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
