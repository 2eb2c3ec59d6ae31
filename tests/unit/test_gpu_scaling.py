"""The rows of the benchmark over several GPUs: what is asked, and what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import scaling
from engine.scaling import GRIDS, TINY
from engine.scaling_engine import Engine, Grid
from records import RefusalError
from vllm_cascade.commands.plan import Plan


@pytest.fixture(autouse=True)
def without_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake ranks have none; elsewhere than on a GPU they need none."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(TINY.model))
    return scaling.plan_of(folder, TINY)


class FakeLLM:
    """Replicas that answer at once, a token a turn of the event loop.

    Args:
        plan: Of the configuration that ranks report.
        ranks: (layers, KV heads) of the ranks of one replica.
        replicas: How many.
        short: Tokens that each request falls short of.
    """

    def __init__(
        self, plan: Plan, ranks: list[tuple[int, int]], replicas: int = 1, short: int = 0
    ) -> None:
        config = dataclasses.asdict(plan.config)
        self.ranks = [
            {"layers": n, "num_kv_heads": h, "config": config, "cudagraph_mode": "NONE"}
            for n, h in ranks
        ]
        self.replicas, self.short = replicas, short
        self.asked: list[tuple[int, int, int | None]] = []
        self.engine_core = SimpleNamespace(
            collective_rpc_async=self._one, call_utility_all_async=self._all
        )

    async def _one(self, method: str) -> list[dict[str, Any]]:
        return self.ranks

    async def _all(self, name: str, *arguments: Any) -> list[list[dict[str, Any]]]:
        assert name == "collective_rpc"
        return [self.ranks] * self.replicas

    async def generate(
        self, prompt: Any, sampling: Any, number: str, *, data_parallel_rank: int | None
    ) -> AsyncIterator[Any]:
        self.asked.append(
            (len(prompt["prompt_token_ids"]), sampling.max_tokens, data_parallel_rank)
        )
        for _ in range(sampling.max_tokens - self.short):
            await asyncio.sleep(0)
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7])])


def measure(llm: FakeLLM, grid: Grid, plan: Plan, **changes: Any) -> dict[str, Any]:
    sizes = dataclasses.replace(TINY, **changes)
    return asyncio.run(Engine(llm, sizes, grid, plan).measure())


LAYERS, HEADS = TINY.model["num_hidden_layers"], TINY.model["num_key_value_heads"]


def test_replicas_share_the_requests(plan: Plan) -> None:
    llm = FakeLLM(plan, [(LAYERS, HEADS)], replicas=2)
    row = measure(llm, GRIDS["dp2"], plan)
    config = plan.config
    full = config.num_sink_tokens + config.cache_tokens + config.stride
    decoding = [replica for prompt, _, replica in llm.asked if prompt == full]
    assert decoding.count(0) == decoding.count(1) == TINY.requests
    assert row["decode_context"] == full
    assert row["decode_tokens_each"] >= 32
    assert row["decode_tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("tp2_mp", [(LAYERS, HEADS // 2)] * 2), ("pp2", [(LAYERS // 2, HEADS)] * 2)],
    ids=["tensor", "pipeline"],
)
def test_all_heads_of_all_layers_are_counted(
    name: str, ranks: list[tuple[int, int]], plan: Plan
) -> None:
    assert measure(FakeLLM(plan, ranks), GRIDS[name], plan)["prefill_tokens_per_s"] > 0
    with pytest.raises(RefusalError, match="2 ranks hold"):
        measure(FakeLLM(plan, [ranks[0], (0, 0)]), GRIDS[name], plan)
    with pytest.raises(RefusalError, match="1 ranks hold"):
        measure(FakeLLM(plan, ranks[:1]), GRIDS[name], plan)


def test_what_is_refused(plan: Plan) -> None:
    ranks = [(LAYERS, HEADS)]
    with pytest.raises(RefusalError, match=r"generated \[3\] tokens, not 4"):
        measure(FakeLLM(plan, ranks, short=1), GRIDS["tp1"], plan)
    with pytest.raises(RefusalError, match="all decoded together for"):
        measure(FakeLLM(plan, ranks), GRIDS["tp1"], plan, margin=0)
    other = dataclasses.replace(plan, config=dataclasses.replace(plan.config, score_decay=0.9))
    with pytest.raises(RefusalError, match="a rank has"):
        measure(FakeLLM(other, ranks), GRIDS["tp1"], plan)


def test_rows_replace_their_own(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for name, gpus in (("pp2", 2), ("tp1", 1), ("pp2", 3)):
        scaling.add_row(path, {"row": name, "gpus": gpus})
    assert scaling.read_rows(path) == [{"row": "tp1", "gpus": "1"}, {"row": "pp2", "gpus": "3"}]


def test_rows_of_another_shape_or_backend_stay(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    kinds = [("8b", "CASCADE"), ("8b", "FLASH_ATTN"), ("70b", "CASCADE"), ("8b", "CASCADE")]
    for number, (shape, backend) in enumerate(kinds):
        row = {"row": "tp8_mp", "shape": shape, "backend": backend, "cache_tokens": 4096}
        scaling.add_row(path, row | {"gpus": number})
    assert sorted(row["gpus"] for row in scaling.read_rows(path)) == ["1", "2", "3"]


def test_ranks_beyond_the_kv_heads_hold_copies(plan: Plan) -> None:
    copies = FakeLLM(plan, [(LAYERS, 1)] * 4)
    assert measure(copies, Grid(tensor=4), plan)["prefill_tokens_per_s"] > 0
    with pytest.raises(RefusalError, match="4 ranks hold"):
        measure(FakeLLM(plan, [(LAYERS, 2)] * 4), Grid(tensor=4), plan)


def test_another_backend_has_no_layers_of_the_cascade(plan: Plan) -> None:
    llm = FakeLLM(plan, [(0, 0)])
    row = measure(llm, GRIDS["tp1"], plan, backend="CPU_ATTN", long=1700)
    assert row["backend"] == "CPU_ATTN"
    assert row["long_tokens"] == 1700 and row["long_ttft_s"] >= 0
    assert [prompt for prompt, _, _ in llm.asked].count(1700) == 1
    with pytest.raises(RefusalError, match="1 ranks hold"):
        measure(FakeLLM(plan, [(LAYERS, HEADS)]), GRIDS["tp1"], plan, backend="CPU_ATTN")


def test_a_whole_run_fits_nine_minutes(plan: Plan) -> None:
    """What takes up to four GPUs, and what takes eight, in two runs each, beside one GPU."""
    four = [grid for grid in GRIDS.values() if 1 < grid.gpus <= 4]
    eight = [grid for grid in GRIDS.values() if grid.gpus == 8]
    for grids in four[:4], four[4:], eight[:4], eight[4:]:
        grids = [Grid(), *grids]
        assert sum(scaling.seconds_of(grid, scaling.FULL, plan) for grid in grids) < 530
