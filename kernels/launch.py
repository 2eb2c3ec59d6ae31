"""Launches Triton kernels at a tenth of the host time that Triton's own look-up takes.

Prefill launches a few small kernels for each wave and layer. Where GPUs share a layer, or a stride
is short, the device is done with them before the host has launched the next.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton

_INT32 = range(-(2**31), 2**31)
# What tells the variants of kernels apart -> compiled kernel and its constants.
_variants: dict[tuple[Hashable, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """As ``kernel[grid](*args, **meta)``, which the first launch of a variant is.

    Args:
        kernel: From `triton.jit`, at the top level of a module.
        grid: Programs, in up to three dimensions.
        args: All arguments that are no constants: tensors, numbers or None.
        meta: All constants of the kernel, which follow its arguments, in its order, and options of
            the compiler.
    """
    if not isinstance(kernel, triton.JITFunction):
        # Triton's interpreter compiles nothing.
        kernel[grid](*args, **meta)
        return
    key = (id(kernel), torch.cuda.current_device(), *map(_kind, args), *meta.values())
    variant = _variants.get(key)
    if variant is None:
        constants = tuple(meta[name] for name in kernel.arg_names[len(args) :])
        _variants[key] = kernel[grid](*args, **meta), constants
        return
    compiled, constants = variant
    compiled[(*grid, 1, 1)[:3]](*args, *constants)


def cdiv(numerator: int, denominator: int) -> int:
    """Quotient rounded up; on the host, where Triton's own takes longer than a launch."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The first power of two, from 1 on, that is not below a number; see `cdiv`."""
    return 1 << max(number - 1, 0).bit_length()


def _kind(value: Any) -> Hashable:
    """What of an argument Triton may compile a variant for, or more."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if type(value) is int:
        return 1 if value == 1 else (value % 16 == 0, value in _INT32)
    return type(value)
