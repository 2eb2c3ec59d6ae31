"""What CASCADE takes over of a loaded model is allocated where vLLM's sleep loses nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from torch import nn

pytest.importorskip("vllm")

from vllm import device_allocator
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

from vllm_cascade.attention import rope
from vllm_cascade.patches import rope_at_logical_place
from vllm_cascade.support import selection
from vllm_cascade.support.sleep import TAG


class Allocator:
    """Notes what vLLM's allocator is asked for."""

    def __init__(self) -> None:
        self.tag: str | None = None
        self.offloaded: tuple[str, ...] = ()

    @contextmanager
    def use_memory_pool(self, tag: str) -> Iterator[None]:
        self.tag = tag
        yield
        self.tag = None

    def sleep(self, offload_tags: tuple[str, ...]) -> None:
        self.offloaded = offload_tags


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    allocator = Allocator()
    monkeypatch.setattr(device_allocator, "get_mem_allocator_instance", lambda: allocator)
    return allocator


@pytest.mark.parametrize(("on_cuda", "sleeps"), [(True, True), (True, False), (False, True)])
def test_what_a_loaded_model_hands_over_is_kept_asleep(
    monkeypatch: pytest.MonkeyPatch, allocator: Allocator, on_cuda: bool, sleeps: bool
) -> None:
    made_under = []
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: on_cuda)
    monkeypatch.setattr(selection, "check_served", lambda *_: None)
    monkeypatch.setattr(rope, "take_over", lambda model: made_under.append(allocator.tag))
    # Put back afterwards, also if the patch has been applied before.
    monkeypatch.setattr(BaseModelLoader, "load_model", lambda *_: nn.Sequential())
    rope_at_logical_place.install()
    target, drafter = (SimpleNamespace(enable_cumem_allocator=each) for each in (sleeps, False))
    speculative = SimpleNamespace(
        method="draft_model", draft_model_config=drafter, target_model_config=target
    )
    for model_config in (target, drafter):
        config = SimpleNamespace(model_config=model_config, speculative_config=speculative)
        BaseModelLoader.load_model(SimpleNamespace(load_weights=None), config, model_config)
    assert made_under == [TAG if on_cuda and sleeps else None] * 2


@pytest.mark.parametrize("level", [1, 2])
def test_vllm_copies_the_tag_at_every_level(allocator: Allocator, level: int) -> None:
    from vllm.device_allocator.sleep_mode_backend import CuMemBackend

    CuMemBackend().suspend(level)
    assert TAG in allocator.offloaded
    assert ("weights" in allocator.offloaded) == (level == 1)
