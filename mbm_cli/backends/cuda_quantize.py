"""Quantisation on CUDA devices: the kernels of kernels/quantize.cu."""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbm_cli.backends import integers
from mbm_cli.backends.cuda_programs import Program, address, filled, source

_THREADS = 256
_MOST_BLOCKS = 1024
_MANY = 1 << 19  # threads, a few times what a GPU runs at once
_SECTOR = 8  # floats: the 32 bytes that memory moves together
# As in quantize.cu, field by field.
_FORMAT = np.dtype([("least", np.float32), ("most", np.float32), ("is_signed", np.int32)])
_ELEMENTWISE = np.dtype(
    [(name, np.uint64) for name in ("x", "grad", "scale", "zero", "out", "poison")]
    + [("count", np.int64), ("row_length", np.int64), ("format", _FORMAT), ("poisoned", np.int32)]
    + [("in_fours", np.int32)],
    align=True,
)
_IMAGES = np.dtype(
    [(name, np.uint64) for name in ("x", "scale", "zero", "codes", "sums", "poison")]
    + [("images", np.int64), ("of_scale", np.int64), ("size", np.int64, 2), ("padding", np.int64, 2)]
    + [("format", _FORMAT), ("channels", np.int32), ("poisoned", np.int32)],
    align=True,
)
_SUMS = np.dtype(
    [(name, np.uint64) for name in ("sums", "of_positions", "of_rows", "input_zero", "weight_zero", "scale", "bias")]
    + [("out", np.uint64), ("images", np.int64)]
    + [(name, np.int64, 2) for name in ("size", "out_size", "kernel", "stride", "dilation")]
    + [("groups", np.int32), ("channels", np.int32), ("steps", np.uint32)],
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


def quantize_and_sum(
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, groups: int, padding: list[int], poison: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    count, channels, *size = x.shape
    padded = [n + 2 * p for n, p in zip(size, padding, strict=True)]
    codes = torch.empty(count, channels, *padded, dtype=torch.uint8, device=x.device)
    sums = torch.empty(count, groups, *padded, dtype=torch.int32, device=x.device)
    if sums.numel() > 0:
        x, scale, zero = x.contiguous(), scale.contiguous(), zero.contiguous()
        images, of_group = count * groups, channels // groups
        argument = filled(
            _IMAGES,
            x=address(x),
            scale=address(scale),
            zero=address(zero),
            codes=address(codes),
            sums=address(sums),
            poison=address(poison),
            images=images,
            of_scale=images // scale.numel(),
            channels=of_group,
            poisoned=0 if poison is None else poison.numel(),
            size=size,
            padding=padding,
            format=_format(bits, False),
        )
        _launch_positions("quantize_and_sum", x, images, math.prod(padded), of_group, argument)
    return codes, sums


def scale_sums(
    sums: Tensor,
    of_positions: Tensor,
    of_rows: Tensor,
    weight_shape: list[int],
    stride: list[int],
    dilation: list[int],
    input_zero: Tensor,
    weight_zero: Tensor,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    output = torch.empty(sums.shape, device=sums.device)
    if output.numel() > 0:
        sums, of_positions, of_rows = sums.contiguous(), of_positions.contiguous(), of_rows.contiguous()
        weight_zero, scale = weight_zero.contiguous(), scale.contiguous()
        bias = None if bias is None else bias.contiguous()
        count, channels, *out_size = sums.shape
        groups = of_positions.shape[1]
        argument = filled(
            _SUMS,
            sums=address(sums),
            of_positions=address(of_positions),
            of_rows=address(of_rows),
            input_zero=address(input_zero),
            weight_zero=address(weight_zero),
            scale=address(scale),
            bias=address(bias),
            out=address(output),
            images=count * groups,
            groups=groups,
            channels=channels // groups,
            steps=math.prod(weight_shape[1:]),
            size=of_positions.shape[2:],
            out_size=out_size,
            kernel=weight_shape[2:],
            stride=stride,
            dilation=dilation,
        )
        _launch_positions("scale_sums", sums, count * groups, math.prod(out_size), channels // groups, argument)
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


def _launch_positions(kernel: str, like: Tensor, images: int, plane: int, channels: int, argument: np.ndarray) -> None:
    """Launch a kernel of unsigned codes; the fewer positions there are, the more threads share the channels of each."""
    positions, sharing = _THREADS, 1
    while 2 * sharing <= channels and (positions > plane or (positions > _SECTOR and images * plane * sharing < _MANY)):
        positions, sharing = positions // 2, sharing * 2
    _launch(kernel, -(-images * plane // positions), like, (argument,), (positions, sharing))


def _launch(
    kernel: str, blocks: int, like: Tensor, arguments: tuple[Any, ...], block: tuple[int, ...] = (_THREADS,)
) -> None:
    pointers = tuple(one.data_ptr() if isinstance(one, Tensor) else one for one in arguments)
    program().launch(kernel, like.device.index, (blocks,), block, pointers)


for _function in (quantize, quantize_and_sum, fake_quantize, quantize_grad, update_range, row_scales, scale_sums):
    torch.library.impl(f"mbm::{_function.__name__}", "cuda", _function)
