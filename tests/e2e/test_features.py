"""Finds alone: a feature of vLLM's that goes wrong past the budget, beside other requests.

A random model of three layers, requests of several budgets, one engine with all features on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from e2e.support import cascade_manager_of, core_of, engine, model_folder, runner_of
from e2e.tiny import ELASTIC, prompt_without_ties, save_llama

# Untied, and no token twice: which of two equal keys is kept is a matter of rounding.
MODEL = {"vocab_size": 2048, "tie_word_embeddings": False}
TEXT = prompt_without_ties(1300, seed=1, neighbours=1300, vocab_size=MODEL["vocab_size"])
PROMPT, OTHER = TEXT[:700], TEXT[700:]
RANK, ALPHA = 4, 8
pytestmark = pytest.mark.model
ADAPTED = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}


def start(model: str, **options: Any) -> Any:
    options = {"max_num_batched_tokens": 256, "max_num_seqs": 6, **options}
    # Beam search asks a tokenizer, of whatever model, for the end of a text.
    options = {"tokenizer": model_folder(), **options}
    return engine(ELASTIC, model, block_size=16, max_model_len=2048, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), **MODEL)


@pytest.fixture(scope="module")
def adapters(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRA adapters of the attention's projections, each beside the model merged with it."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for seed, folder in enumerate(folders):
        save_adapter(folder, model, seed)
    return folders


def save_adapter(folder: Path, model: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(Path(model) / "model.safetensors")
    adapter = {}
    for name, weight in tensors.items():
        if not any(part in name for part in ADAPTED):
            continue
        down = torch.randn(RANK, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5
        up = torch.randn(weight.shape[0], RANK, generator=generator) * RANK**-0.5
        layer = "base_model.model." + name.removesuffix(".weight")
        adapter |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        tensors[name] = weight + ALPHA / RANK * up @ down
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "target_modules": sorted(part.partition(".")[2] for part in ADAPTED),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    merged = folder / "merged"
    merged.mkdir()
    (merged / "config.json").write_text((Path(model) / "config.json").read_text())
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})


def sampling(max_tokens: int = 20, **options: Any) -> SamplingParams:
    options = {"temperature": 0, "logprobs": 0, "presence_penalty": 2, **options}
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False, **options)


def run(llm: Any, *prompts: Any, params: SamplingParams | None = None, **options: Any) -> list[Any]:
    given = [p if isinstance(p, dict) else {"prompt_token_ids": p} for p in prompts]
    return llm.generate(given, params or sampling(), use_tqdm=False, **options)


def check_same(found: Any, expected: Any) -> None:
    """The same tokens with the same log-probabilities, up to the order of additions."""
    for answer, wanted in zip(found.outputs, expected.outputs, strict=True):
        assert answer.token_ids == wanted.token_ids
        ours, theirs = (torch.tensor(logprobs_of(each)) for each in (answer, wanted))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def logprobs_of(answer: Any) -> list[float]:
    steps = zip(answer.logprobs, answer.token_ids, strict=True)
    return [step[token].logprob for step, token in steps]


@pytest.fixture(scope="module")
def merged(adapters: list[Path]) -> list[Any]:
    """What models merged with the adapters answer, before the engine of all other tests starts."""
    found = []
    for folder in adapters:
        with start(str(folder / "merged")) as llm:
            found += run(llm, PROMPT)
    return found


@pytest.fixture(scope="module", params=["adapters", "others"])
def shared_llm(model: str, merged: list[Any], request: pytest.FixtureRequest) -> Iterator[Any]:
    """Beside adapters vLLM computes no log-probabilities of prompts on a CPU."""
    features: dict[str, Any] = {"enable_prompt_embeds": True, "scheduling_policy": "priority"}
    if request.param == "adapters":
        features = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with start(model, enable_prefix_caching=True, **features) as llm:
        yield llm


OTHERS = pytest.mark.parametrize("shared_llm", ["others"], indirect=True)


@pytest.fixture
def llm(shared_llm: Any) -> Any:
    assert shared_llm.reset_prefix_cache()
    return shared_llm


@pytest.mark.parametrize("shared_llm", ["adapters"], indirect=True)
def test_adapters(llm: Any, adapters: list[Path], merged: list[Any]) -> None:
    """Two at once, then the second one under the first one's name.

    Not beside a request without: vLLM's operators for a CPU give it an adapter's part too.
    """
    first, second = (
        LoRARequest(name, number, str(folder))
        for number, (name, folder) in enumerate(zip("ab", adapters, strict=True), 1)
    )
    (plain,) = run(llm, PROMPT)
    assert len({tuple(each.outputs[0].token_ids) for each in (plain, *merged)}) == 3
    # What the model alone has left behind is not what they begin with.
    found = run(llm, PROMPT, PROMPT, lora_request=[first, second])
    for each, expected in zip(found, merged, strict=True):
        check_same(each, expected)
    assert [each.num_cached_tokens for each in found] == [0, 0]
    (again,) = run(llm, PROMPT, lora_request=first)
    (other,) = run(llm, PROMPT, lora_request=LoRARequest("a", 3, str(adapters[1])))
    check_same(again, merged[0])
    check_same(other, merged[1])
    assert again.num_cached_tokens > 0 == other.num_cached_tokens


@OTHERS
def test_prompt_embeddings(llm: Any, model: str) -> None:
    """A prompt of embeddings is answered as the tokens that they belong to."""
    table = load_file(Path(model) / "model.safetensors")["model.embed_tokens.weight"]
    given = [{"prompt_embeds": table[torch.tensor(prompt)]} for prompt in (PROMPT, OTHER)]
    # Penalties count a prompt's tokens, which embeddings have none of.
    params = sampling(presence_penalty=0)
    expected = run(llm, PROMPT, OTHER, params=params)
    for each, wanted in zip(run(llm, *given, params=params), expected, strict=True):
        check_same(each, wanted)


@OTHERS
def test_log_probabilities_of_a_prompt(llm: Any, model: str) -> None:
    """Of all its tokens, whatever is remembered of it, however it is cut."""
    params = sampling(1, prompt_logprobs=0)
    run(llm, PROMPT)
    first, beside = run(llm, PROMPT, OTHER, params=params)
    (again,) = run(llm, PROMPT, params=params)
    assert first.num_cached_tokens == again.num_cached_tokens == 0
    ours, theirs = (
        torch.tensor([step[token].logprob for step, token in zip(*pair, strict=True)])
        for pair in (
            (each.prompt_logprobs[1:], each.prompt_token_ids[1:]) for each in (first, again)
        )
    )
    assert len(ours) == len(PROMPT) - 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert len(beside.prompt_logprobs) == len(OTHER)


@OTHERS
def test_beam_search(llm: Any) -> None:
    """Each beam goes on from the prompt, or from its own last step."""
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    (found,) = llm.beam_search([{"prompt_token_ids": PROMPT}], params)
    assert len(found.sequences) == 3
    for beam in found.sequences:
        answer = beam.tokens[len(PROMPT) :]
        assert len(answer) == 6
        whole = sampling(1, prompt_logprobs=0, presence_penalty=0)
        (scored,) = run(llm, beam.tokens, params=whole)
        total = sum(
            step[token].logprob
            for step, token in zip(scored.prompt_logprobs[-6:], answer, strict=True)
        )
        assert beam.cum_logprob == pytest.approx(total, abs=1e-2)


@OTHERS
def test_an_urgent_request_takes_the_blocks_of_others(llm: Any) -> None:
    """Of several answers to a prompt, which are computed again."""
    # As greedy as a request for several answers may be.
    several = sampling(80, n=3, temperature=1, top_k=1)
    prompts = {"slow": OTHER[:100], "urgent": PROMPT[:100]}
    (expected,) = run(llm, prompts["slow"], params=several)
    (alone,) = run(llm, prompts["urgent"], params=sampling(80))
    assert llm.reset_prefix_cache()
    scheduler, core = core_of(llm).scheduler, llm.llm_engine
    pool, preempted = cascade_manager_of(llm).block_pool, []
    original = scheduler._preempt_request

    def preempt(request: Any, *args: Any, **options: Any) -> None:
        preempted.append(request.request_id)
        original(request, *args, **options)

    outputs: dict[str, Any] = {}

    def step() -> None:
        outputs.update({each.request_id: each for each in core.step()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "_preempt_request", preempt)
        core.add_request("slow", {"prompt_token_ids": prompts["slow"]}, several, priority=1)
        core.add_request(
            "urgent", {"prompt_token_ids": prompts["urgent"]}, sampling(80), priority=0
        )
        while len(scheduler.running) < 4 or any(not r.num_output_tokens for r in scheduler.running):
            step()
        taken = pool.get_new_blocks(pool.get_num_free_blocks())
        while "urgent" not in outputs or not outputs["urgent"].finished:
            step()
        pool.free_blocks(taken)
        while core.has_unfinished_requests():
            step()
    assert preempted and not any("urgent" in name for name in preempted)
    check_same(outputs["slow"], expected)
    check_same(outputs["urgent"], alone)


@OTHERS
def test_steps_of_nobody(llm: Any) -> None:
    """An engine of several that has nothing to do runs along; requests are not touched."""
    check_interrupted(llm, lambda: core_of(llm).execute_dummy_batch(), range(100))


@OTHERS
def test_paused_and_resumed(llm: Any) -> None:
    """In the middle of prefill and of decode."""

    def pause() -> None:
        core_of(llm).pause_scheduler("keep")
        assert not llm.llm_engine.step()
        core_of(llm).resume_scheduler()

    check_interrupted(llm, pause, (2, 9))


@pytest.fixture
def slept(llm: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An engine whose pages hold NaN after a sleep, as on a GPU, and the levels it has slept at."""
    levels, runner = list[int](), runner_of(llm)

    def sleep(level: int) -> None:
        levels.append(level)
        for cache in runner.kv_caches:
            torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage()).fill_(255)

    worker = core_of(llm).model_executor.driver_worker.worker
    monkeypatch.setattr(worker, "sleep", sleep)
    return levels


@OTHERS
def test_nothing_is_found_after_a_sleep(llm: Any, slept: list[int]) -> None:
    """Neither a prefix, nor an end, nor the copy of a prompt; and no block is held."""
    (answer,) = run(llm, PROMPT)
    turn = PROMPT + list(answer.outputs[0].token_ids) + OTHER[:90]
    (alone,) = run(llm, turn, params=sampling(skip_reading_prefix_cache=True))
    (asked,) = run(llm, PROMPT + OTHER[:90])
    assert asked.num_cached_tokens > ELASTIC["cache_tokens"]
    (answer,) = run(llm, PROMPT)
    llm.sleep(1)
    llm.wake_up()
    pool = cascade_manager_of(llm).block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    for prompt, expected in ((turn, alone), (PROMPT + OTHER[:90], asked), (PROMPT, answer)):
        (found,) = run(llm, prompt, params=sampling())
        assert found.num_cached_tokens == 0
        check_same(found, expected)
        assert llm.reset_prefix_cache()
    assert slept == [1]


@OTHERS
def test_slept_in_the_middle(llm: Any, slept: list[int]) -> None:
    """Of prefill and of decode: requests that are kept are computed again."""

    def sleep() -> None:
        core_of(llm).sleep(1, "keep")
        core_of(llm).wake_up()

    check_interrupted(llm, sleep, (2, 9, 15))
    assert slept == [1, 1, 1]


def check_interrupted(llm: Any, interrupt: Callable[[], None], after: Container[int]) -> None:
    """Two requests are answered as without what happens after some of their steps."""
    expected = run(llm, PROMPT, OTHER)
    assert llm.reset_prefix_cache()
    core, steps = llm.llm_engine, 0
    for name, prompt in (("0", PROMPT), ("1", OTHER)):
        core.add_request(name, {"prompt_token_ids": prompt}, sampling())
    outputs: dict[str, Any] = {}
    while core.has_unfinished_requests():
        outputs.update({each.request_id: each for each in core.step()})
        steps += 1
        if steps in after:
            interrupt()
    assert steps > 9
    for name, wanted in enumerate(expected):
        check_same(outputs[str(name)], wanted)


@OTHERS
def test_weights_updated_in_place(llm: Any, adapters: list[Path], merged: list[Any]) -> None:
    """Nothing that other weights have computed is found again. The last test of this engine."""
    run(llm, PROMPT)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(adapters[0] / "merged")})
    assert llm.reset_prefix_cache()
    (found,) = run(llm, PROMPT)
    assert found.num_cached_tokens == 0
    check_same(found, merged[0])
