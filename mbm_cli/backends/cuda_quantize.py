"""Quantisation on CUDA devices: the kernels of kernels/quantize.cu."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbm_cli.backends import integers
from mbm_cli.backends.cuda_programs import Program, source

_THREADS = 256
_MOST_BLOCKS = 1024
_FORMAT = np.dtype([("least", np.float32), ("most", np.float32), ("is_signed", np.int32)])


@lru_cache(maxsize=1)
def program() -> Program:
    return Program("quantisation", source("quantize.cu"))


def quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int, signed: bool, poison: Tensor | None = None) -> Tensor:
    codes = torch.empty(x.shape, dtype=torch.int8 if signed else torch.uint8, device=x.device)
    poisoned = (0, np.int32(0)) if poison is None else (poison, np.int32(poison.numel()))
    return _elementwise("quantize", codes, [x], scale, zero, bits, signed, *poisoned)


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int, signed: bool) -> Tensor:
    return _elementwise("fake_quantize", torch.empty(x.shape, device=x.device), [x], scale, zero, bits, signed)


def quantize_grad(grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor, bits: int, signed: bool) -> Tensor:
    return _elementwise("quantize_grad", torch.empty(x.shape, device=x.device), [grad, x], scale, zero, bits, signed)


def update_range(x: Tensor, running: Tensor, momentum: float, bits: int, signed: bool) -> Tensor:
    if x.numel() == 0:
        return integers.update_range(x, running, momentum, bits, signed)
    x, blocks = x.contiguous(), _blocks(x.numel())
    parts, scale = x.new_empty(blocks, 2), x.new_empty(2)
    _launch("range_parts", blocks, x, (x, parts, x.numel()))
    arguments = parts, np.int32(blocks), running, np.float32(momentum), scale, _format(bits, signed)
    _launch("update_range", 1, x, arguments)
    return scale


def row_scales(x: Tensor, bits: int, signed: bool) -> Tensor:
    x, scales = x.contiguous(), x.new_empty(2, len(x))
    _launch("row_scales", len(x), x, (x, scales, x.numel() // len(x), _format(bits, signed)))
    return scales


def scale_sums(
    sums: Tensor,
    windows: Tensor,
    weight: Tensor,
    input_zero: Tensor,
    weight_zero: Tensor,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    sums, windows, output = sums.contiguous(), windows.contiguous(), torch.empty(sums.shape, device=sums.device)
    if output.numel() > 0:
        offsets = sums.new_empty(len(weight))
        arguments = weight.contiguous(), input_zero, weight_zero, offsets, weight[0].numel()
        _launch("row_offsets", len(weight), sums, arguments)
        operands = sums, windows, offsets, weight_zero, scale, 0 if bias is None else bias.contiguous(), output
        sizes = sums.numel(), sums[0, 0].numel(), np.int32(len(weight)), np.int32(len(weight) // windows.shape[1])
        _launch("scale_sums", _blocks(sums.numel()), sums, (*operands, *sizes))
    return output


def _elementwise(
    kernel: str, out: Tensor, operands: list[Tensor], scale: Tensor, zero: Tensor, bits: int, signed: bool, *rest: Any
) -> Tensor:
    if out.numel() > 0:
        values = [one.contiguous() for one in (*operands, scale, zero)]
        row_length = out.numel() // scale.numel()
        arguments = *values, out, out.numel(), row_length, _format(bits, signed), *rest
        _launch(kernel, _blocks(out.numel()), out, arguments)
    return out


def _format(bits: int, signed: bool) -> np.ndarray:
    return np.array([(*integers.code_range(bits, signed), signed)], dtype=_FORMAT)


def _blocks(count: int) -> int:
    return max(1, min(_MOST_BLOCKS, -(-count // _THREADS)))


def _launch(kernel: str, blocks: int, like: Tensor, arguments: tuple[Any, ...]) -> None:
    pointers = tuple(one.data_ptr() if isinstance(one, Tensor) else one for one in arguments)
    program().launch(kernel, like.device.index, (blocks,), (_THREADS,), pointers)


for _function in (quantize, fake_quantize, quantize_grad, update_range, row_scales, scale_sums):
    torch.library.impl(f"mbm::{_function.__name__}", "cuda", _function)
