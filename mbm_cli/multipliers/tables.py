"""Tables: the fractions of all products of two m-bit fractions, in files and in memory."""

import hashlib
import io
import os
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# Entries of a .bin file are bytes, those of a .npy file 16-bit words: fraction and carry must fit.
MOST_BITS = {".bin": 7, ".npy": 11}
# Where a .bin file has the carry, whatever the number of fraction bits (the format of ApproxTrain).
BIN_CARRY = 1 << 7
INTEGER_BITS = 8  # of the published tables of integer multipliers, which can be mistaken for one of fractions
MOST_BIAS = 0.42  # of products of significands, in tables of at least so many bits: the published 1-bit table has 0.39
LEAST_BITS = 4


@dataclass(frozen=True)
class Table:
    """A multiplier of ``bits``-bit fractions as a table.

    Attributes:
        bits: m, the fraction bits of operands and product, 1 to 11.
        entries: uint16 (2^m, 2^m): ``entries[fa, fb]`` holds the m bits of the product's fraction in its low bits and
            in bit m the carry into the exponent.

    Raises:
        ValueError: entries of another shape, or with more than m + 1 bits.
    """

    bits: int
    entries: np.ndarray = field(compare=False, repr=False)
    digest: str = field(init=False)  # of the entries

    def __post_init__(self) -> None:
        wanted = (1 << self.bits, 1 << self.bits)
        if self.entries.dtype != np.uint16 or self.entries.shape != wanted:
            raise ValueError(f"the entries are {self.entries.dtype} {self.entries.shape}, not uint16 {wanted}")
        wrong = np.argwhere(self.entries >= 1 << (self.bits + 1))
        if len(wrong):
            fa, fb = wrong[0]
            raise ValueError(
                f"entry {(fa << self.bits) | fb} is {self.entries[fa, fb]}, but a fraction of {self.bits} bits and a "
                f"carry are at most {(1 << (self.bits + 1)) - 1}"
            )
        object.__setattr__(self, "digest", hashlib.sha256(self.entries.tobytes()).hexdigest())

    def tensor(self) -> Tensor:
        """Return the table as the operators take it: int16 (2^m + 1, 2^m), on the CPU.

        A row for each fraction of b, because a kernel looks many fractions of a up for one b, then a row of zeros.
        m is at least 2, so that a row is whole words: the entries of a smaller table are repeated.
        """
        entries, bits = self.entries, max(self.bits, 2)
        if bits > self.bits:
            entries = entries.repeat(2, axis=0).repeat(2, axis=1) << 1
        rows = np.concatenate([entries.T, np.zeros((1, 1 << bits), np.uint16)])
        return torch.from_numpy(np.ascontiguousarray(rows).view(np.int16))


class HasTensor(Hashable, Protocol):
    """A table that operators take as a tensor."""

    def tensor(self) -> Tensor: ...


def tensor_on(table: HasTensor, device: torch.device) -> Tensor:
    """Return ``table.tensor()`` on a device; the last ones are kept, because functions are called again and again."""
    if is_in_torch_dispatch_mode():  # whose tensors, fake ones for example, are of no use outside it
        return table.tensor().to(device)
    return _kept_tensor(table, device)


@lru_cache(maxsize=32)
def _kept_tensor(table: HasTensor, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whose tensors no training may save
        return table.tensor().to(device)


def read(path: Path) -> Table:
    """Read a table: ``.bin``, 2^(2m) bytes (m up to 7), or ``.npy``, uint16 of that many (m up to 11).

    A byte of a ``.bin`` file has the fraction in its low m bits and the carry in bit 7, as ApproxTrain's tables do.
    Files of earlier versions of mbm, with the carry in bit m, are recognised by having no bit 7.

    Raises:
        ValueError: the file is missing or holds something else; the message names the file and the fault.
    """
    if path.suffix not in MOST_BITS:
        raise ValueError(f"{path}: a table is a .bin or a .npy file")
    most = MOST_BITS[path.suffix]
    try:
        size = path.stat().st_size
        if size > (2 << (2 * most)) + 4096:  # bytes, a .npy file's header included
            integers = ": a 256 x 256 table of 16-bit integers?" if size >= 2 << (2 * INTEGER_BITS) else ""
            raise ValueError(f"{path} has {size:,} bytes, more than a table of {most} fraction bits{integers}")
        content = path.read_bytes()
        if path.suffix == ".bin":
            entries = np.frombuffer(content, np.uint8).astype(np.uint16)
        else:
            entries = _load_npy(content, path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or 'not a .npy file'}") from None
    bits = (entries.size.bit_length() - 1) // 2
    if not 1 <= bits <= most or entries.size != 1 << (2 * bits):
        raise ValueError(
            f"{path} has {entries.size:,} entries, but a table for m-bit fractions has 2^(2m), m from 1 to {most}"
        )
    if path.suffix == ".bin" and (entries & BIN_CARRY).any():
        carries = np.where(entries >= BIN_CARRY, 1 << bits, 0)
        entries = ((entries & (BIN_CARRY - 1)) | carries).astype(np.uint16)
    try:
        table = Table(bits, np.ascontiguousarray(entries).reshape(1 << bits, 1 << bits))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _refuse_other_tables(table, path)
    return table


def _load_npy(content: bytes, path: Path) -> np.ndarray:
    try:
        entries = np.load(io.BytesIO(content), allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy raises errors of many kinds for a damaged header
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as .npy: {first}") from None
    if not isinstance(entries, np.ndarray) or entries.dtype != np.uint16:
        raise ValueError(f"{path} holds {getattr(entries, 'dtype', 'no array')}, but a table's entries are uint16")
    return entries


def _refuse_other_tables(table: Table, path: Path) -> None:
    """Refuse tables that are well-formed, but not of products of significands.

    Raises:
        ValueError: the entries are integer products, or far from any product of significands.
    """
    n, words = 1 << table.bits, table.entries.astype(np.int64)
    codes = {"unsigned": np.arange(n), "signed": (np.arange(n) + n // 2) % n - n // 2}
    for kind, numbers in codes.items() if table.bits == INTEGER_BITS else ():
        for shift in range(table.bits + 1):
            distance = ((np.outer(numbers, numbers) >> shift) - words) % n
            if np.minimum(distance, n - distance).mean() < n / 32:
                raise ValueError(
                    f"{path} looks like a table of {kind} integer products (a * b >> {shift}), "
                    "but lut: takes fractions of products of significands"
                )
    significands = 1 + np.arange(n) / n
    products = (1 + (words & (n - 1)) / n) * (1 + (words >> table.bits))
    bias = float((products / np.outer(significands, significands)).mean() - 1)
    if table.bits >= LEAST_BITS and abs(bias) > MOST_BIAS:
        raise ValueError(
            f"{path} is not a table of products of significands: they would be wrong by {100 * bias:+.0f} % on average"
        )


def write(table: Table, path: Path) -> None:
    """Write a table as ``.bin`` or ``.npy``, whole or not at all.

    Raises:
        ValueError: another suffix, a table with too many bits for it, or a file that cannot be written.
    """
    if path.suffix not in MOST_BITS:
        raise ValueError(f"{path}: name a .bin or a .npy file")
    if table.bits > MOST_BITS[path.suffix]:
        raise ValueError(f"{path}: a {path.suffix} file holds at most {MOST_BITS[path.suffix]} bits, not {table.bits}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            if path.suffix == ".bin":
                carry, fraction = table.entries >> table.bits, table.entries & ((1 << table.bits) - 1)
                file.write((fraction | carry * BIN_CARRY).astype(np.uint8).tobytes())
            else:
                np.save(file, table.entries)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
