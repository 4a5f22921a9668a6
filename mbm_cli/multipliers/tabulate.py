"""Users' products of floats: checked, and tabulated."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mbm_cli.errors import MbmError, first_line
from mbm_cli.multipliers.tables import Table

Product = Callable[[Tensor, Tensor], Tensor]

MOST_BITS = 11
PAIRS = 4096  # operands of a check


def tabulate(product: Product, bits: int, name: str = "the function") -> Table:
    """Tabulate a product of significands, its fractions cut to the table's bits.

    Args:
        product: takes two float32 tensors of one shape and returns a third.
        bits: fraction bits of operands and product.
        name: of the function, for errors.

    Raises:
        ValueError: more bits than a table may have, or a product outside [1, 4).
    """
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"{name}: a table has 1 to {MOST_BITS} fraction bits, not {bits}")
    significands = 1 + torch.arange(1 << bits, dtype=torch.float32) / (1 << bits)
    a, b = (x.flatten() for x in torch.meshgrid(significands, significands, indexing="ij"))
    products = _call(product, a, b, name)
    _refuse(~((products >= 1) & (products < 4)), a, b, products, name, "but a product of significands is in [1, 4)")
    entries = (products.view(torch.int32) - (127 << 23)) >> (23 - bits)
    return Table(bits, entries.numpy().astype(np.uint16).reshape(1 << bits, 1 << bits))


def check_scaling(product: Product, bits: int, name: str) -> None:
    """Check that signs and exponents behave as in a multiplication: a table holds fractions alone.

    Raises:
        ValueError: they do not, with the pair of operands that shows it.
    """
    generator = torch.Generator().manual_seed(0)
    fractions = torch.randint(0, 1 << bits, (2, PAIRS), generator=generator) / (1 << bits)
    exponents = torch.randint(-30, 31, (2, PAIRS), generator=generator)
    signs = 1 - 2 * torch.randint(0, 2, (2, PAIRS), generator=generator)
    scale = signs * torch.exp2(exponents.float())
    a, b = scale * (1 + fractions)
    x, y = 1 + fractions
    expected = scale[0] * scale[1] * _call(product, x, y, name)
    found = _call(product, a, b, name)
    wrong = ~(found == expected)
    _refuse(wrong, a, b, found, name, "which is not the product of the significands with its sign and power of two")


def check_magnitude(product: Product, name: str) -> None:
    """Check a product on all bits: its sign, its size up to a factor of 4, and zero for zero.

    Raises:
        ValueError: a product fails, with the pair of operands that shows it.
    """
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 1 << 23, (2, PAIRS), generator=generator)
    exponents = torch.randint(80, 175, (2, PAIRS), generator=generator)
    signs = torch.randint(0, 2, (2, PAIRS), generator=generator)
    a, b = ((signs << 31) | (exponents << 23) | patterns).to(torch.int32).view(torch.float32)
    found = _call(product, a, b, name)
    ratio = found / (a.double() * b)
    _refuse(~((ratio >= 0.25) & (ratio <= 4)), a, b, found, name, "whose sign or size is not a product's")
    zeros = torch.zeros(PAIRS)
    for x, y in ((zeros, b), (a, zeros)):
        found = _call(product, x, y, name)
        _refuse(~(found == 0), x, y, found, name, "but zero times a number is zero")


def _call(product: Product, a: Tensor, b: Tensor, name: str) -> Tensor:
    """Call the function and check the result's shape and type.

    Raises:
        ValueError: the function raises, or returns something else.
    """
    try:
        with torch.no_grad():
            products = product(a.clone(), b.clone())
    except MbmError:
        raise
    except Exception as error:
        raise ValueError(f"{name} raises {first_line(error)}") from None
    if not isinstance(products, Tensor) or products.dtype != torch.float32 or products.shape != a.shape:
        what = f"{products.dtype} {tuple(products.shape)}" if isinstance(products, Tensor) else type(products).__name__
        raise ValueError(f"{name} returns {what} for two float32 {tuple(a.shape)}, not their products in float32")
    return products.cpu()


def _refuse(wrong: Tensor, a: Tensor, b: Tensor, products: Tensor, name: str, why: str) -> None:
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(f"{name} is not a multiplier: {a[i]:.9g} x {b[i]:.9g} gives {products[i]:.9g}, {why}")
