"""Launches Triton kernels at a fraction of the host time that Triton's own look-up takes.

Prefill launches a few small kernels for each wave and layer. Where GPUs share a layer, or a stride
is short, the device finishes those kernels before the host has launched the next ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
import triton

_INT32 = range(-(2**31), 2**31)
# What tells the variants of kernels apart -> compiled kernel and its constants.
_variants: dict[tuple[Hashable, ...], tuple[Any, tuple[Any, ...]]] = {}
_thread = threading.local()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch as ``kernel[grid](*args, **meta)`` would.

    The first launch of a variant goes through Triton; later ones reuse the compiled kernel.

    Args:
        kernel: From `triton.jit`, at the top level of a module.
        grid: Programs, in up to three dimensions.
        args: All arguments that are no constants: tensors, numbers, or None for an absent tensor.
        meta: All constants of the kernel, in its order (they follow its other arguments), then
            options of the compiler.

    Raises:
        KeyError: If a constant of the kernel is missing.
    """
    recording: Recording | None = getattr(_thread, "recording", None)
    if not isinstance(kernel, triton.JITFunction):
        # Triton's interpreter compiles nothing.
        kernel[grid](*args, **meta)
        if recording is not None:
            recording.add(partial(kernel[grid], **meta), args)
        return
    key = (id(kernel), torch.cuda.current_device(), *map(_kind, args), *meta.values())
    variant = _variants.get(key)
    is_new = variant is None
    if variant is None:
        constants = tuple(meta[name] for name in kernel.arg_names[len(args) :])
        variant = _variants[key] = kernel[grid](*args, **meta), constants
    compiled, constants = variant
    call = compiled[(*grid, 1, 1)[:3]]
    if not is_new:
        call(*args, *constants)
    if recording is not None:
        recording.add(call, (*args, *constants), takes_addresses=True)


class Recording:
    """Launches that similar layers repeat, each with its own tensors: no wrapper, no look-up.

    As a context manager a recording keeps what `launch` does in this thread. An argument that is
    one of `tensors` (the same object) is replaced when the recording repeats. Every other argument
    stays as it is: numbers, None, and the addresses of tensors that must outlive the recording.

    Args:
        tensors: What the next layer replaces, in the order of `repeat`; None for an absent tensor.
            Where a tensor is absent, kernels get None, and nothing is replaced.

    Raises:
        ValueError: If a tensor is given twice.
        RuntimeError: On entry, if this thread is recording already.
    """

    def __init__(self, tensors: Sequence[torch.Tensor | None]) -> None:
        self._index = {id(t): index for index, t in enumerate(tensors) if t is not None}
        if len(self._index) != sum(t is not None for t in tensors):
            raise ValueError("each tensor to be replaced must be given once, one is given twice")
        self._storages = {t.untyped_storage().data_ptr() for t in tensors if t is not None}
        # Function, arguments, which of them are replaced by which tensor, whether by its address.
        self._calls: list[tuple[Callable[..., Any], list[Any], list[tuple[int, int]], bool]] = []

    def __enter__(self) -> Recording:
        if getattr(_thread, "recording", None) is not None:
            raise RuntimeError("recordings do not nest")
        _thread.recording = self
        return self

    def __exit__(self, *_: object) -> None:
        _thread.recording = None

    def add(
        self, call: Callable[..., Any], args: Sequence[Any], *, takes_addresses: bool = False
    ) -> None:
        """Append a launch.

        Args:
            call: What launches.
            args: Its arguments.
            takes_addresses: Whether addresses may stand for tensors.

        Raises:
            RuntimeError: If an argument is a view of a tensor to be replaced.
        """
        kept: list[Any] = list(args)
        places = []
        for place, arg in enumerate(args):
            if not isinstance(arg, torch.Tensor):
                continue
            index = self._index.get(id(arg))
            if index is not None:
                places.append((place, index))
                # The first layer's tensors are not kept alive.
                kept[place] = None
            elif arg.untyped_storage().data_ptr() in self._storages:
                raise RuntimeError(f"argument {place} is a view of a tensor that is replaced")
            elif takes_addresses:
                kept[place] = arg.data_ptr()
        self._calls.append((call, kept, places, takes_addresses))

    def repeat(self, tensors: Sequence[torch.Tensor | None]) -> None:
        """Repeat all launches with other tensors.

        Args:
            tensors: What replaces the recorded tensors, in their order. `alike` must be equal for
                both: absent in the same places, of the same dtypes and strides, and at addresses
                that are multiples of 16 in the same places. Nothing checks this.
        """
        addresses = [None if t is None else t.data_ptr() for t in tensors]
        for call, args, places, takes_addresses in self._calls:
            for place, index in places:
                args[place] = addresses[index] if takes_addresses else tensors[index]
            call(*args)


def alike(tensors: Sequence[torch.Tensor | None]) -> Hashable:
    """What must be equal for tensors to take each other's place in a `Recording`.

    Shapes are not compared. A recording serves one step, whose layers of a kind have the same.

    Args:
        tensors: As `Recording` takes them.
    """
    return tuple(None if t is None else (t.dtype, t.stride(), _is_aligned(t)) for t in tensors)


def cdiv(numerator: int, denominator: int) -> int:
    """Divide and round up; Triton's own function takes longer on the host than a launch."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two, at least 1, that is not below a number; see `cdiv`."""
    return 1 << max(number - 1, 0).bit_length()


def _is_aligned(tensor: torch.Tensor) -> bool:
    """Whether Triton may load 16 bytes at a time from the tensor's address on."""
    return tensor.data_ptr() % 16 == 0


def _kind(value: Any) -> Hashable:
    """What Triton may compile a variant for; two equal kinds always share a variant.

    None is a kind of its own, for Triton compiles it as a constant.
    """
    if isinstance(value, torch.Tensor):
        return value.dtype, _is_aligned(value)
    if type(value) is int:
        return 1 if value == 1 else (value % 16 == 0, value in _INT32)
    return type(value)
