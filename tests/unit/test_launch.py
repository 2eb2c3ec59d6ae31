"""A kernel is looked up anew for all that Triton compiles a variant for, and for nothing else.

What is recorded is launched again with other tensors, and nothing of it is baked in by mistake.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from vllm_cascade.kernels.launch import Recording, alike, cdiv, launch, next_power_of_2


@triton.jit
def kernel(data_ptr, other_ptr, number, factor, WIDTH: tl.constexpr, FLAG: tl.constexpr):
    pass


class Compiled:
    """Remembers how it was launched."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.launches.append((grid, *args))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """What Triton was asked to compile or look up, in order."""
    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("Triton interprets")
    asked: list[Compiled] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **meta: Any) -> Compiled:
        asked.append(Compiled())
        return asked[-1]

    monkeypatch.setattr(triton.JITFunction, "run", run)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("vllm_cascade.kernels.launch._variants", {})
    return asked


def call(data: torch.Tensor, other: Any, number: int, factor: float, **meta: Any) -> None:
    launch(kernel, (7, 2), data, other, number, factor, **{"WIDTH": 32, "FLAG": True, **meta})


def test_the_second_launch_is_not_looked_up(compiled: list[Compiled]) -> None:
    data = torch.zeros(64)
    call(data, None, 48, 0.5, num_warps=4)
    assert len(compiled) == 1 and compiled[0].launches == []
    # Another address, number and factor of the same kinds.
    data = torch.zeros(32)
    call(data, None, 64, 0.25, num_warps=4)
    (again,) = compiled
    assert again.launches == [((7, 2, 1), data, None, 64, 0.25, 32, True)]


ALIGNED = torch.zeros(64)
OTHERS = {
    "dtype": {"data": ALIGNED.int()},
    "alignment": {"data": ALIGNED[1:]},
    "tensor, not None": {"other": ALIGNED},
    "one": {"number": 1},
    "no multiple of 16": {"number": 40},
    "64 bits": {"number": 2**31},
    "constant": {"WIDTH": 64},
    "last constant": {"FLAG": False},
    "option": {"num_warps": 8},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_is_looked_up(compiled: list[Compiled], name: str) -> None:
    given = {"data": ALIGNED, "other": None, "number": 48, "factor": 0.5, "num_warps": 4}
    call(**given)
    call(**(given | OTHERS[name]))
    assert len(compiled) == 2
    call(**given)
    call(**(given | OTHERS[name]))
    assert [len(each.launches) for each in compiled] == [1, 1]


def test_constants_have_to_be_whole(compiled: list[Compiled]) -> None:
    with pytest.raises(KeyError, match="FLAG"):
        launch(kernel, (1,), ALIGNED, None, 1, 0.5, WIDTH=32)


def test_a_recording_is_launched_with_other_tensors(compiled: list[Compiled]) -> None:
    data, other = torch.zeros(64), torch.ones(64)
    with Recording((data, None)) as recording:
        call(data, other, 48, 0.5)
        call(other, data, 48, 0.5)
        call(data, None, 64, 0.5)
    assert len(compiled) == 2
    first, second = compiled
    # The first launch of a variant is Triton's own.
    assert [len(each.launches) for each in compiled] == [1, 0]
    new = torch.zeros(64)
    recording.repeat((new, None))
    here, there = new.data_ptr(), other.data_ptr()
    assert first.launches[1:] == [
        ((7, 2, 1), here, there, 48, 0.5, 32, True),
        ((7, 2, 1), there, here, 48, 0.5, 32, True),
    ]
    assert second.launches == [((7, 2, 1), here, None, 64, 0.5, 32, True)]
    call(data, other, 48, 0.5)
    recording.repeat((data, None))
    assert [len(each.launches) for each in compiled] == [6, 2]


def test_views_of_what_is_replaced_cannot_be_recorded(compiled: list[Compiled]) -> None:
    data = torch.zeros(64)
    with Recording((data,)), pytest.raises(RuntimeError, match="argument 1 is a view"):
        call(ALIGNED, data[16:], 48, 0.5)
    call(ALIGNED, data[16:], 48, 0.5)


def test_recordings_do_not_nest() -> None:
    with Recording(()), pytest.raises(RuntimeError, match="nest"), Recording(()):
        pass
    with Recording(()):
        pass


def test_alike() -> None:
    matrix = torch.zeros(8, 32)
    given = (matrix, None)
    assert alike(given) == alike((torch.ones(4, 32), None))
    others = [torch.zeros(8, 48)[:, :32], matrix.int(), torch.zeros(8 * 32 + 1)[1:].view(8, 32)]
    assert all(alike(given) != alike((other, None)) for other in others)
    assert alike(given) != alike((matrix, matrix))


def test_arithmetic_is_as_in_triton() -> None:
    for number in range(1, 300):
        assert next_power_of_2(number) == triton.next_power_of_2(number)
        assert cdiv(number, 7) == triton.cdiv(number, 7)
    assert next_power_of_2(0) == 1
