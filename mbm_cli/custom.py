"""Multipliers that users bring: functions in Python, which become tables, and functions in C, which are compiled."""

import hashlib
import os
import re
import runpy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mbm_cli.errors import MbmError
from mbm_cli.lut import Table

Product = Callable[[Tensor, Tensor], Tensor]

DEFAULT_BITS = 7
MOST_BITS = 11
PAIRS = 4096  # of the check
_C_SIZE_LIMIT = 1 << 20
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Code:
    """A function in C, ``uint32_t function(uint32_t a, uint32_t b)``, on the bit patterns of float32 numbers."""

    function: str
    text: str = field(repr=False)

    digest: str = field(init=False)

    # Its own name could be one of the kernels' (mbm, product), so they call it by this one.
    NAME = "mbm_users_function"

    def renamed(self, text: str) -> str:
        """C that holds the function, with the function given the name that the kernels call."""
        return f"#define {self.function} {self.NAME}\n{text}\n#undef {self.function}\n"

    def __post_init__(self) -> None:
        content = f"{self.function}\n{self.text}".encode()
        object.__setattr__(self, "digest", hashlib.sha256(content).hexdigest())


def split(reference: str) -> tuple[Path, str]:
    """``FILE:function`` in its two parts.

    Raises:
        ValueError: it is no such reference, or there is no such file.
    """
    name, _, function = reference.rpartition(":")
    if not name or not _IDENTIFIER.fullmatch(function):
        raise ValueError(f"{reference!r}: write the file and its function, FILE:function")
    path = Path(os.path.expanduser(name))  # Path's own, and is_file, raise for names that no file can have
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such file")
    return path, function


def read_c(reference: str) -> Code:
    """The function of ``FILE.h:function``; compiling it is up to the backends.

    Raises:
        ValueError: there is no such file, or no such function in it.
    """
    path, function = split(reference)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if len(text) > _C_SIZE_LIMIT:
        raise ValueError(f"{path} is larger than {_C_SIZE_LIMIT >> 20} MiB: that is no multiplier")
    if not re.search(rf"\b{function}\s*\(", text):
        raise ValueError(f"{path} has no function {function}")
    if re.search(r'^\s*#\s*include\s*"', text, re.MULTILINE):
        # What is compiled is kept by the content of this file.
        raise ValueError(
            f'{path} includes another file: a multiplier is one file, put it in the place of #include "..."'
        )
    return Code(function, text)


def read_python(reference: str, bits: int) -> Table:
    """Run the file of ``FILE.py:function`` and tabulate its function.

    Raises:
        ValueError: there is no such file or function, it raises, or what it computes is no multiplier's product.
    """
    path, function = split(reference)
    try:
        product = runpy.run_path(str(path)).get(function)
    except BaseException as error:  # whatever the file does when it is run
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"{path} cannot be run: {_first_line(error)}") from None
    if not callable(product):
        raise ValueError(f"{path} has no function {function}")
    name = f"{path}:{function}"
    check_scaling(product, bits, name)
    return tabulate(product, bits, name)


def tabulate(product: Product, bits: int, name: str = "the function") -> Table:
    """The table of a product of significands: each is called for, and its fraction cut to as many bits.

    Args:
        product: takes two float32 tensors of one shape and gives a third.
        bits: fraction bits of operands and product.
        name: of the function, for errors.

    Raises:
        ValueError: more bits than a table may have, or a product outside of [1, 4).
    """
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"{name}: a table has 1 to {MOST_BITS} fraction bits, not {bits}")
    significands = 1 + torch.arange(1 << bits, dtype=torch.float32) / (1 << bits)
    a, b = (x.flatten() for x in torch.meshgrid(significands, significands, indexing="ij"))
    products = call(product, a, b, name)
    _refuse(~((products >= 1) & (products < 4)), a, b, products, name, "but a product of significands is in [1, 4)")
    entries = (products.view(torch.int32) - (127 << 23)) >> (23 - bits)
    return Table(bits, entries.numpy().astype(np.uint16).reshape(1 << bits, 1 << bits))


def check_scaling(product: Product, bits: int, name: str) -> None:
    """A table knows fractions alone: signs and exponents must do what a multiplication's do.

    Raises:
        ValueError: they do not; it says on which pair.
    """
    generator = torch.Generator().manual_seed(0)
    fractions = torch.randint(0, 1 << bits, (2, PAIRS), generator=generator) / (1 << bits)
    exponents = torch.randint(-30, 31, (2, PAIRS), generator=generator)
    signs = 1 - 2 * torch.randint(0, 2, (2, PAIRS), generator=generator)
    scale = signs * torch.exp2(exponents.float())
    a, b = scale * (1 + fractions)
    x, y = 1 + fractions
    expected = scale[0] * scale[1] * call(product, x, y, name)
    found = call(product, a, b, name)
    wrong = ~(found == expected)
    _refuse(wrong, a, b, found, name, "which is not the product of the significands with its sign and power of two")


def check_magnitude(product: Product, name: str) -> None:
    """What a product on all bits must keep to: its sign, its size up to a factor of 4, and zero for zero.

    Raises:
        ValueError: it does not; it says on which pair.
    """
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 1 << 23, (2, PAIRS), generator=generator)
    exponents = torch.randint(80, 175, (2, PAIRS), generator=generator)
    signs = torch.randint(0, 2, (2, PAIRS), generator=generator)
    a, b = ((signs << 31) | (exponents << 23) | patterns).to(torch.int32).view(torch.float32)
    found = call(product, a, b, name)
    ratio = found / (a.double() * b)
    _refuse(~((ratio >= 0.25) & (ratio <= 4)), a, b, found, name, "whose sign or size is not a product's")
    zeros = torch.zeros(PAIRS)
    for x, y in ((zeros, b), (a, zeros)):
        found = call(product, x, y, name)
        _refuse(~(found == 0), x, y, found, name, "but zero times a number is zero")


def call(product: Product, a: Tensor, b: Tensor, name: str) -> Tensor:
    """The function's products, checked for their shape and type.

    Raises:
        ValueError: the function raises, or gives something else.
    """
    try:
        with torch.no_grad():
            products = product(a.clone(), b.clone())
    except MbmError:
        raise
    except Exception as error:
        raise ValueError(f"{name} raises {_first_line(error)}") from None
    if not isinstance(products, Tensor) or products.dtype != torch.float32 or products.shape != a.shape:
        what = f"{products.dtype} {tuple(products.shape)}" if isinstance(products, Tensor) else type(products).__name__
        raise ValueError(f"{name} gives {what} for two float32 {tuple(a.shape)}, not their products, likewise float32")
    return products.cpu()


def _refuse(wrong: Tensor, a: Tensor, b: Tensor, products: Tensor, name: str, why: str) -> None:
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(f"{name} is no multiplier: {a[i]:.9g} x {b[i]:.9g} gives {products[i]:.9g}, {why}")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
