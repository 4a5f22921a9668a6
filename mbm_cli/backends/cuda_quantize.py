"""Quantisation on CUDA devices: the kernels of kernels/quantize.cu."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbm_cli.backends import integers
from mbm_cli.backends.cuda_programs import Program, address, source

_THREADS = 256
_MOST_BLOCKS = 1024
# As in quantize.cu, field by field.
_FORMAT = np.dtype([("least", np.float32), ("most", np.float32), ("is_signed", np.int32)])
_ELEMENTWISE = np.dtype(
    [(name, np.uint64) for name in ("x", "grad", "scale", "zero", "out", "poison")]
    + [("count", np.int64), ("row_length", np.int64), ("format", _FORMAT), ("poisoned", np.int32)]
    + [("in_fours", np.int32)],
    align=True,
)


@lru_cache(maxsize=1)
def program() -> Program:
    return Program("quantisation", source("quantize.cu"))


def quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int, signed: bool, poison: Tensor | None = None) -> Tensor:
    codes = torch.empty(x.shape, dtype=torch.int8 if signed else torch.uint8, device=x.device)
    return _elementwise("quantize", codes, x, scale, zero, bits, signed, poison=poison)


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int, signed: bool) -> Tensor:
    return _elementwise("fake_quantize", torch.empty(x.shape, device=x.device), x, scale, zero, bits, signed)


def quantize_grad(grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor, bits: int, signed: bool) -> Tensor:
    return _elementwise("quantize_grad", torch.empty(x.shape, device=x.device), x, scale, zero, bits, signed, grad)


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
    kernel: str,
    out: Tensor,
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    signed: bool,
    grad: Tensor | None = None,
    poison: Tensor | None = None,
) -> Tensor:
    count = out.numel()
    if count > 0:
        x, scale, zero = x.contiguous(), scale.contiguous(), zero.contiguous()
        grad = None if grad is None else grad.contiguous()
        row_length = count // scale.numel()
        in_fours = (count | row_length) % 4 == 0 and (address(x) | address(grad) | address(out)) % 16 == 0
        argument = np.zeros(1, _ELEMENTWISE)
        argument.view(np.uint64)[:6] = [address(one) for one in (x, grad, scale, zero, out, poison)]
        argument["count"], argument["row_length"], argument["format"] = count, row_length, _format(bits, signed)
        argument["poisoned"], argument["in_fours"] = 0 if poison is None else poison.numel(), in_fours
        _launch(kernel, _blocks(count // 4 if in_fours else count), out, (argument,))
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
