"""The CPU kernels, compiled from kernels/conv2d.cpp; pointers are addresses of float32 memory."""

from collections.abc import Sequence

class Multiplier:
    def __init__(self, family: str, bits: int, result_bits: int, table: int = 0, kernels: int = 0) -> None: ...

def conv2d(
    input: int,
    weight: int,
    bias: int,
    output: int,
    counts: Sequence[int],
    size: Sequence[int],
    kernel: Sequence[int],
    out_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    input_strides: Sequence[int],
    weight_strides: Sequence[int],
    output_strides: Sequence[int],
    native: Multiplier,
    threads: int,
    /,
) -> None: ...
def multiply(a: int, b: int, out: int, count: int, native: Multiplier, threads: int, /) -> None: ...
def ceiling(native: Multiplier, rounds: int, threads: int, /) -> int: ...
def instruction_sets() -> list[str]: ...
def use_instruction_set(name: str, /) -> None: ...
def integer_conv2d(
    input: int,
    weight: int,
    output: int,
    table: int,
    factors: tuple[int, int, int, int],
    terms: int,
    counts: tuple[int, int, int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    out_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    input_strides: tuple[int, ...],
    output_strides: tuple[int, ...],
    padding_code: int,
    threads: int,
) -> None: ...
def integer_instruction_sets() -> list[str]: ...
def use_integer_instruction_set(name: str) -> None: ...
def integer_costs() -> list[float]: ...
