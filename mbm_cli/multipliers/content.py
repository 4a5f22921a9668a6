"""Content of multipliers: what their names refer to, read in one place and handed to operators as arguments."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mbm_cli.multipliers import integer, integer_files, tables
from mbm_cli.multipliers.code.c import Function, read_c, tabulate_c
from mbm_cli.multipliers.code.python import Namespace, read_python
from mbm_cli.multipliers.float32 import reference_product
from mbm_cli.multipliers.integer import IntegerTable
from mbm_cli.multipliers.names import Backward, IntegerMultiplier, LayerMultipliers, Multiplier
from mbm_cli.multipliers.tables import Table
from mbm_cli.multipliers.tabulate import tabulate

_exchanged = WeakTensorKeyDictionary()
TABLE = "table"  # the handle of every product that a table defines


def resolve(multiplier: Multiplier | str, run: dict[Path, Namespace] | None = None) -> Multiplier:
    """Return the multiplier with its content read: a table, a tabulated Python function, or a C function's source.

    A multiplier that has its content, or needs none, is returned as it is. A Python function is run.

    Args:
        run: Python files that were run already, by their paths; those that are run now are added.

    Raises:
        ValueError: not a multiplier's name, or the file is missing or wrong.
    """
    if isinstance(multiplier, str):
        multiplier = Multiplier.parse(multiplier)
    if not isinstance(multiplier, Multiplier):
        raise ValueError(f"a multiplier is a Multiplier or its name, not {multiplier!r}")
    if multiplier.content is not None:
        return multiplier
    if isinstance(multiplier, IntegerMultiplier):
        return replace(multiplier, content=_integers(multiplier, {} if run is None else run))
    if not multiplier.is_file:
        return multiplier
    content: Table | Function
    if multiplier.family == "lut":
        content = tables.read(Path(os.path.expanduser(multiplier.file)))
    elif multiplier.family == "c":
        content = read_c(multiplier.file, multiplier.function)
        if multiplier.bits is not None:
            content = tabulate_c(content, multiplier.bits, str(multiplier))
    else:
        content = read_python(multiplier.file, multiplier.function, multiplier.bits, {} if run is None else run)
    return replace(multiplier, content=content)


def _integers(multiplier: IntegerMultiplier, run: dict[Path, Namespace]) -> IntegerTable:
    """Make or read the table of an integer multiplier."""
    operands = multiplier.operands
    if multiplier.is_file:
        return integer_files.read(multiplier, run)
    if operands.bits not in integer.WIDTHS:
        raise ValueError(f"{multiplier} is for mbm characterize; networks take operands of up to 8 bits")
    return integer.tabulate(multiplier.family, operands, multiplier.truncate, multiplier.leading_bits)


def _resolver() -> Callable[[Multiplier], Multiplier]:
    """Return `resolve` for several multipliers, which runs each file once."""
    run: dict[Path, Namespace] = {}
    return lambda multiplier: resolve(multiplier, run)


def resolve_layers(
    multiplier: Multiplier | LayerMultipliers | Mapping[str, Multiplier | str] | str,
    resolve: Callable[[Multiplier], Multiplier] | None = None,
) -> Multiplier | LayerMultipliers:
    """Resolve a multiplier, or each distinct multiplier of several by layer, once.

    Raises:
        ValueError: as `resolve`.
    """
    resolve = resolve or _resolver()
    if isinstance(multiplier, Mapping):
        multiplier = LayerMultipliers.of_mapping(multiplier)
    if not isinstance(multiplier, LayerMultipliers):
        return resolve(Multiplier.parse(multiplier) if isinstance(multiplier, str) else multiplier)
    read = {one: resolve(one) for one in multiplier.distinct()}
    return replace(multiplier, layers=tuple((layer, read[one]) for layer, one in multiplier.layers))


def resolve_backward(
    backward: Backward | Multiplier | Mapping[str, Multiplier | str] | str,
    resolve: Callable[[Multiplier], Multiplier] | None = None,
) -> Backward:
    """Resolve the multipliers of both gradients.

    Raises:
        ValueError: as `resolve`, or not what `Backward.of` takes.
    """
    backward, resolve = Backward.of(backward), resolve or _resolver()
    return Backward(*[one if one is None else resolve(one) for one in (backward.input, backward.weight)])


def operands(multiplier: Multiplier, device: torch.device) -> tuple[str, Tensor | None]:
    """Return what the operators take for a resolved multiplier: its handle, and its table on the device if it has one.

    The handle is a short form, ``table``, or the source of a function in C.
    """
    if isinstance(multiplier.content, Table):
        return TABLE, tables.tensor_on(multiplier.content, device)
    return handle_of(multiplier), None


def integer_table(multiplier: Multiplier, device: torch.device) -> Tensor:
    """Return the table of a resolved integer multiplier on the device, as the integer operators take it."""
    return tables.tensor_on(multiplier.content, device)


def exchange(table: Tensor) -> Tensor:
    """Return an operator's table with its operands exchanged, for as long as the table lives."""
    if table not in _exchanged:
        _exchanged[table] = torch.cat([table[:-1].t(), table[-1:]]).contiguous()
        if table.is_cuda:
            torch.cuda.current_stream(table.device).synchronize()  # other streams read it, too
    made: Tensor = _exchanged[table]
    return made


def handle_of(multiplier: Multiplier) -> str:
    """Return the text that names a resolved multiplier's product to the operators."""
    if isinstance(multiplier.content, Function):
        return multiplier.content.handle
    return TABLE if multiplier.content is not None else str(multiplier)


@lru_cache(maxsize=256)
def of_handle(handle: str) -> Multiplier:
    """Return the multiplier of an operator's handle; a table's content is the operator's tensor.

    Raises:
        ValueError: not a handle.
    """
    if handle == TABLE:
        return Multiplier("lut", file=TABLE)
    if handle.startswith("c:"):
        function = Function.of_handle(handle)
        return Multiplier("c", file="function.h", function=function.name, content=function)
    return Multiplier.parse(handle)


def export(multiplier: Multiplier, bits: int) -> Table:
    """Tabulate a resolved multiplier for operands of so many fraction bits; its products are cut to as many.

    Raises:
        ValueError: more bits than a table may have, or a function in C that does not compile or multiply.
    """
    if isinstance(multiplier.content, Function):
        return tabulate_c(multiplier.content, bits, str(multiplier))
    return tabulate(lambda a, b: reference_product(a, b, multiplier), bits, str(multiplier))
