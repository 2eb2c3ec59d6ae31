"""The rows of the benchmark by context length: what is in them, and what is left out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import context as benchmark
from records import RefusalError


class FakeEngine:
    """An engine of 100 free blocks of 16 tokens, in which a step takes 1 ms and 0.1 ms a request.

    Args:
        off: What an assumed context's step takes, over a prefilled one's.
        broken: What goes wrong where requests run together.
    """

    block_size, free_blocks, block_bytes = 16, 100, 1 << 20
    config, facts = None, {"cudagraph_mode": "FULL_DECODE_ONLY"}

    def __init__(self, off: float = 1.0, broken: Exception | None = None) -> None:
        model = SimpleNamespace(max_model_len=1024)
        self.vllm_config = SimpleNamespace(model_config=model)
        self.off, self.broken = off, broken
        self.ran: list[tuple[int, int, bool]] = []

    def run(self, prompt: int, output: int, requests: int = 1, *, is_assumed: bool = False) -> Any:
        self.ran.append((prompt, requests, is_assumed))
        if requests > 1 and self.broken:
            raise self.broken
        blocks = requests * -(-(prompt + output) // self.block_size)
        step = 1e-3 + 1e-4 * (requests - 1)
        return SimpleNamespace(
            first_token_s=0.5, step_s=step * self.off if is_assumed else step, blocks=blocks
        )


def measured(engine: FakeEngine, context: int) -> dict[str, Any]:
    return benchmark.measure(engine, benchmark.FULL, context)


def test_a_row() -> None:
    engine = FakeEngine()
    row = measured(engine, 512)
    # One request prefilled three times and once assumed, then as many as fit.
    assert engine.ran == [(448, 1, False)] * 3 + [(448, 1, True), (448, 3, True)]
    assert (row["ttft_s"], row["tpot_ms"], row["tpot_assumed_ms"]) == (0.5, 1.0, 1.0)
    assert (row["kv_mib_per_request"], row["requests_fit"], row["requests_at_once"]) == (32, 3, 3)
    assert (row["ms_per_step"], row["tokens_per_s"]) == (1.2, 2500.0)
    assert row["kv_mib_at_once"] == 96 and not row["note"]


def test_no_more_at_once_than_the_engine_takes() -> None:
    engine = FakeEngine()
    engine.free_blocks = 100_000
    assert measured(engine, 512)["requests_at_once"] == 64


def test_a_context_that_is_not_run_has_what_is_computed() -> None:
    engine = FakeEngine()
    row = measured(engine, 4096)
    assert not engine.ran and (row["requests_fit"], row["kv_mib_per_request"]) == (0, 256)
    assert row["ttft_s"] is row["tpot_ms"] is row["tokens_per_s"] is None
    assert "not run" in row["note"]


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        (FakeEngine(off=1.2), r"\+20.0% off"),
        (FakeEngine(off=0.8), r"-20.0% off"),
        (FakeEngine(broken=RefusalError("3 preemptions")), "3 preemptions"),
        (FakeEngine(broken=KeyError("x")), "x"),
    ],
)
def test_one_request_is_reported_where_many_are_not(engine: FakeEngine, why: str) -> None:
    row = measured(engine, 512)
    assert row["tpot_ms"] == 1.0
    assert row["requests_at_once"] is row["tokens_per_s"] is row["ms_per_step"] is None
    assert why.replace("\\", "") in row["note"]


def test_rows_take_the_place_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for backend, context, seconds in (("B", 64, 1), ("A", 64, 2), ("A", 8, 3), ("B", 64, 4)):
        benchmark.add_row(path, {"backend": backend, "context": context, "ttft_s": seconds})
    found = [tuple(row.values()) for row in benchmark.read_rows(path)]
    assert found == [("A", "8", "3"), ("A", "64", "2"), ("B", "64", "4")]


def test_the_whole_plan_fits_its_time() -> None:
    """Both engines within 400 s, each within the time after which it is killed."""
    sizes = benchmark.FULL
    total = 0.0
    for backend in sizes.longest:
        steps = benchmark.plan(sizes, backend, list(sizes.lengths))
        assert [n for n, _ in steps] == [n for n in sizes.lengths if n <= sizes.longest[backend]]
        total += benchmark.START_S + sum(seconds for _, seconds in steps)
    assert total < 400
