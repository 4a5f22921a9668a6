"""Files of integer multipliers, in every format that the field has: functions, arrays in C, and tables of numbers."""

import io
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mbm_cli.multipliers.code import existing
from mbm_cli.multipliers.code.c import C_SIZE_LIMIT, plain_type
from mbm_cli.multipliers.code.integers import integers_of_c, integers_of_python
from mbm_cli.multipliers.integer import IntegerTable, Operands
from mbm_cli.multipliers.names import ORDERS, IntegerMultiplier

SIZE_LIMIT = 8 << 20  # bytes; 65,536 numbers as text are about 0.5 MB
CODES, SORTED, TRANSPOSED = ORDERS
_CLEAR = 0.5  # an order is chosen if it is at most so far from the products, compared with the other one
_TABLE = "table"
_SIGNATURE = "write int16_t f(int8_t A, int8_t B), also with other integer types"

_COMMENT = r"/\*.*?\*/|//[^\n]*"
_NO_CODE = re.compile(rf'{_COMMENT}|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*', re.DOTALL | re.MULTILINE)
_DEFINITION = re.compile(r"\b(?P<name>[A-Za-z_]\w*)\s*\((?P<parameters>[^(){};]*)\)\s*\{")
_RESULT = re.compile(r"[A-Za-z_][\w\s*]*\Z")
_PARAMETER = re.compile(r"(?P<type>.*[\s*])(?P<name>\w+)", re.DOTALL)
_FIXED_WIDTH = re.compile(r"(?P<unsigned>u?)int(?:_fast|_least)?(?P<bits>8|16|32|64)_t")
_INTEGER_WORDS = {"signed", "unsigned", "char", "short", "int", "long"}
_ARRAY = re.compile(r"\b(?P<name>[A-Za-z_]\w*)\s*(?:\[[^\]{}]*\]\s*)+[^={};]*=\s*\{")
_C_NUMBER = re.compile(r"[-+]?\s*(?:0[xX](?P<hex>[0-9a-fA-F]+)|(?P<decimal>[0-9]+))[uUlL]*")
# As EvoApproxLib writes them, `// PDK45_PWR = 0.301 mW`, and in words.
_COST = re.compile(
    r"(?:\b(?P<process>[A-Za-z0-9]+)_|\b|_)(?P<name>power|pwr|area|delay)\b[ \t]*[=:][ \t]*"
    r"(?P<figure>[0-9][0-9.]*(?:e[-+]?[0-9]+)?)"
    r"[ \t]*(?P<unit>[munpµμ]?(?:W|s|m\^?2|m²)\b)?",
    re.IGNORECASE,
)


class _Found(NamedTuple):
    """What a file holds.

    Attributes:
        products: integers (2^n, 2^n).
        widths: those of the bit patterns that they may be instead of numbers.
        is_table: whether the order of rows and columns is to be found.
    """

    products: np.ndarray
    widths: set[int]
    is_table: bool = True


class _Function(NamedTuple):
    """A function's definition in C; types have no qualifiers."""

    result: str
    name: str
    parameters: tuple[tuple[str, str], ...]  # types and names

    def __str__(self) -> str:
        return f"{self.result} {self.name}({', '.join(type for type, _ in self.parameters)})"

    @property
    def multiplies_integers(self) -> bool:
        types = [self.result, *(type for type, _ in self.parameters)]
        return len(types) == 3 and all(map(_is_integer, types))

    def call(self, operands: Operands) -> str:
        """Return the call for the bit patterns ``mbm_a`` of the activation and ``mbm_b`` of the weight.

        The operands are those called A and B, in either order, else the first and the second.
        """
        names = [name.upper() for _, name in self.parameters]
        patterns = ("mbm_b", "mbm_a") if names == ["B", "A"] else ("mbm_a", "mbm_b")
        sign = 1 << (operands.bits - 1)
        arguments = (
            f"({type})({pattern} - (({pattern} & {sign}) << 1))"
            if operands.signed and not _is_unsigned(type)
            else f"({type}){pattern}"
            for (type, _), pattern in zip(self.parameters, patterns, strict=True)
        )
        return f"{self.name}({', '.join(arguments)})"


def read(multiplier: IntegerMultiplier, run: dict[Path, dict[str, Any]]) -> IntegerTable:
    """Read the table of a multiplier's file, or make it with the file's function; row a, column b.

    Args:
        run: what was read or run already; this table is added, so that a command runs a function once.

    Raises:
        ValueError: the file is missing or holds something else, its order cannot be told, or its function is wrong.
    """
    # No file has this path, so the namespaces of Python files, which are kept there, too, have other keys.
    kept = run.setdefault(Path(multiplier.located), {})
    if _TABLE not in kept:
        kept[_TABLE] = _read(multiplier)
    table: IntegerTable = kept[_TABLE]
    return table


def _read(multiplier: IntegerMultiplier) -> IntegerTable:
    operands, orders = multiplier.operands, set(multiplier.order) - {TRANSPOSED}
    if len(orders) > 1:
        raise ValueError(f"{multiplier}: a table has one order, {CODES} or {SORTED}")
    path = existing(multiplier.file)
    content, costs = _content(path), {}
    match path.suffix.lower():
        case ".py":
            found = _of_array(integers_of_python(path, multiplier.function, operands), operands, False)
        case ".npy":
            found = _of_npy(content, path, operands)
        case ".bin":
            found = _of_bin(content, path, operands)
        case ".txt":
            found = _of_text(_decoded(content), path, operands)
        case _:
            text = _decoded(content)
            found, costs = _of_c(text, path, multiplier.function, operands), costs_of(text)
    if orders and not found.is_table:
        raise ValueError(f"{multiplier}: a function has no order, so leave @{orders.pop()} away")
    readings = _readings(found, path, operands)
    if not found.is_table or not operands.signed:
        entries = _nearest(readings, operands)
    else:
        entries = _in_order(readings, operands, next(iter(orders), ""), multiplier)
    if not multiplier.order:
        _refuse_other_format(entries, operands, multiplier)
    if TRANSPOSED in multiplier.order:
        entries = entries.T
    return IntegerTable(operands, np.ascontiguousarray(entries, np.int32), costs)


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise ValueError(f"{path} is larger than {SIZE_LIMIT >> 20} MiB, too large for a multiplier")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _refuse_other_format(entries: np.ndarray, operands: Operands, multiplier: IntegerMultiplier) -> None:
    """Refuse products that are much nearer to those of unsigned operands than of signed ones, or the reverse."""
    other = Operands(operands.bits, not operands.signed)
    patterns = entries & ((1 << 2 * operands.bits) - 1)
    half = 1 << (2 * operands.bits - 1)
    read = {operands: entries, other: (patterns + half) % (2 * half) - half if other.signed else patterns}
    distances = []
    for one, products in read.items():
        exact = np.outer(one.numbers(), one.numbers())
        distances.append(np.abs(products - exact).mean() / np.abs(exact).mean())
    if distances[1] < distances[0] / 4:
        raise ValueError(
            f"{multiplier} holds products of {other} operands: write {other}:{multiplier.file}, or @codes to take them"
        )


def _decoded(content: bytes) -> str:
    """Decode text; what is not UTF-8 is in comments, authors' names for example."""
    return content.decode("utf-8-sig", errors="replace")


# Numbers and their order


def _readings(found: _Found, path: Path, operands: Operands) -> list[np.ndarray]:
    """Return what the products may be: the numbers that they are, and those of which they are the bit patterns.

    Files often have unsigned words for signed products, and signed ones for unsigned products.
    """
    least, most = int(found.products.min()), int(found.products.max())
    words = found.products.astype(np.int64)
    readings = [words] if least >= -(1 << 31) and most < 1 << 31 else []
    for width in sorted(found.widths):
        half = 1 << (width - 1)
        if operands.signed and least >= 0 and half <= most < 2 * half:
            # The words of 64 bits became negative above.
            readings.append(words if width == 64 else np.where(words >= half, words - 2 * half, words))
        elif not operands.signed and width < 32 and -half <= least < 0 and most < half:
            readings.append(words & (2 * half - 1))
    fitting = [one for one in readings if one.min() >= -(1 << 31) and one.max() < 1 << 31]
    if not fitting:
        raise ValueError(f"{path}: the product {most if most >= 1 << 31 else least} has more than 32 bits")
    return fitting


def _distance(entries: np.ndarray, operands: Operands) -> float:
    """Return the mean distance from the products."""
    numbers = operands.numbers()
    return float(np.abs(entries - np.outer(numbers, numbers)).mean())


def _nearest(readings: list[np.ndarray], operands: Operands) -> np.ndarray:
    return min(readings, key=lambda entries: _distance(entries, operands))


def _by_codes(entries: np.ndarray) -> np.ndarray:
    """Reorder a table with operands from the least to the largest number: by their bit patterns."""
    half = len(entries) // 2
    return np.roll(entries, (half, half), (0, 1))


def _in_order(readings: list[np.ndarray], operands: Operands, order: str, name: object) -> np.ndarray:
    """Return a signed table by bit patterns; its order is the one that is named, or else clearly nearer to products.

    Raises:
        ValueError: none is named, and neither is much nearer.
    """
    by_codes = _nearest(readings, operands)
    by_numbers = _nearest([_by_codes(entries) for entries in readings], operands)
    order = order or _clear_order(_distance(by_codes, operands), _distance(by_numbers, operands))
    if not order:
        raise ValueError(
            f"{name}: rows and columns may be in the order of bit patterns ({CODES}: 0..{operands.most}, "
            f"{operands.least}..-1) or of numbers ({SORTED}: {operands.least}..{operands.most}): write @{CODES} or "
            f"@{SORTED} behind the name"
        )
    return by_codes if order == CODES else by_numbers


def _clear_order(by_codes: float, by_numbers: float) -> str:
    """Return the order of the smaller distance if it is clearly smaller, else nothing."""
    if min(by_codes, by_numbers) > _CLEAR * max(by_codes, by_numbers):
        return ""
    return CODES if by_codes < by_numbers else SORTED


# Tables of numbers


def _square(numbers: np.ndarray, path: Path, operands: Operands, what: str = "") -> np.ndarray:
    """Return numbers as rows and columns.

    Raises:
        ValueError: another number of numbers.
    """
    size = 1 << operands.bits
    if numbers.shape not in ((size, size), (size * size,)):
        found = " x ".join(f"{one:,}" for one in numbers.shape) or "1"
        raise ValueError(f"{path}{what} has {found} numbers, not the {size} x {size} products of {operands}")
    return numbers.reshape(size, size)


def _of_array(products: np.ndarray, operands: Operands, is_table: bool = True) -> _Found:
    width = 8 * products.dtype.itemsize
    narrow = {2 * operands.bits} if products.dtype.kind == "u" else set()
    return _Found(products, {width} | narrow, is_table)


def _of_npy(content: bytes, path: Path, operands: Operands) -> _Found:
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # numpy raises errors of many kinds for a damaged header
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as .npy: {first}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {getattr(array, 'dtype', 'no array')}, not integers")
    return _of_array(_square(array, path, operands), operands)


def _of_bin(content: bytes, path: Path, operands: Operands) -> _Found:
    count = 1 << (2 * operands.bits)
    types = {2 * count: "<i2" if operands.signed else "<u2", 4 * count: "<i4"}
    if len(content) not in types:
        raise ValueError(
            f"{path} has {len(content):,} bytes, but the {count:,} products of {operands} have {2 * count:,} as 16-bit "
            f"or {4 * count:,} as 32-bit integers"
        )
    products = np.frombuffer(content, types[len(content)]).astype(np.int64)
    return _Found(_square(products, path, operands), {2 * operands.bits})


def _of_text(text: str, path: Path, operands: Operands) -> _Found:
    numbers = []
    for i, line in enumerate(text.splitlines(), 1):
        for word in re.split(r"[\s,;]+", line.partition("#")[0]):
            if word:
                numbers.append(_integer(word, f"{path}, line {i}"))
    return _of_list(numbers, path, operands)


def _integer(word: str, where: str) -> int:
    word = word[:40]  # which is more than 64 bits
    with suppress(ValueError):
        return int(word, 16) if "x" in word.lower() else int(word)
    with suppress(ValueError, OverflowError):
        if float(word) == int(float(word)):  # numpy.savetxt writes integers so
            return int(float(word))
    raise ValueError(f"{where}: {word!r} is not an integer")


def _of_list(numbers: list[int], path: Path, operands: Operands, what: str = "") -> _Found:
    if numbers and (min(numbers) < -(1 << 31) or max(numbers) >= 1 << 32):
        raise ValueError(f"{path}{what}: the product {max(numbers, key=abs)} has more than 32 bits")
    return _Found(_square(np.array(numbers, np.int64), path, operands, what), {2 * operands.bits, 16, 32})


# Text in C


def _of_c(text: str, path: Path, name: str, operands: Operands) -> _Found:
    """Call the function that is named, or the file's only one of two integers; else read the array of products."""
    plain = _NO_CODE.sub(" ", text)
    functions = list(_functions(plain))
    fitting = [one for one in functions if one.multiplies_integers and name in ("", one.name)]
    if len(fitting) == 1:
        return _of_function(fitting[0], text, path, operands)
    if fitting:
        names = ", ".join(one.name for one in fitting)
        raise ValueError(f"{path} has several functions of two integers: name one of {names}, {path}:{fitting[0].name}")
    if name:
        others = [str(one) for one in functions if one.name == name]
        if others:
            raise ValueError(f"{path}: {others[0]} is not a function of two integers: {_SIGNATURE}")
        known = ", ".join(one.name for one in functions) or "none"
        raise ValueError(f"{path}: there is no definition of a function {name} (found: {known}): {_SIGNATURE}")
    arrays = list(_ARRAY.finditer(plain))
    wanted = 1 << (2 * operands.bits)
    found = [(match["name"], _initialisers(plain, match.end() - 1)) for match in arrays]
    of_products = [(array, words) for array, words in found if words.count(",") >= wanted - 1] or found[:1]
    if len(of_products) > 1:
        raise ValueError(f"{path} has several tables: {', '.join(array for array, _ in of_products)}; keep one")
    if of_products:
        array, words = of_products[0]
        return _of_list(_c_numbers(words, f"{path}: {array}"), path, operands, f": {array}")
    instead = f", but {functions[0]}" if functions else ""
    raise ValueError(f"{path} has no function of two integers and no array{instead}: {_SIGNATURE}")


def _functions(plain: str) -> list[_Function]:
    """Find the functions that a text defines."""
    found = []
    for match in _DEFINITION.finditer(plain):
        before = _RESULT.search(plain, max(0, match.start() - 200), match.start())
        if before and match["name"] not in ("if", "while", "switch"):
            parameters = tuple(map(_parameter, match["parameters"].split(",")))
            found.append(_Function(plain_type(before[0]), match["name"], parameters))
    return found


def _parameter(text: str) -> tuple[str, str]:
    match = _PARAMETER.fullmatch(text.strip())
    return (plain_type(match["type"]), match["name"]) if match else (plain_type(text), "")


def _is_integer(type: str) -> bool:
    words = type.split()
    known = bool(words) and set(words) <= _INTEGER_WORDS and words != ["char"]  # whose sign depends on the machine
    return known or bool(_FIXED_WIDTH.fullmatch(type))


def _is_unsigned(type: str) -> bool:
    return type.startswith("uint") or "unsigned" in type.split()


def _of_function(function: _Function, text: str, path: Path, operands: Operands) -> _Found:
    for type, _ in function.parameters:
        if operands.most > 127 and not _is_unsigned(type) and ("char" in type or "8_t" in type):
            raise ValueError(f"{path}: {function} takes {type}, which does not have all numbers of {operands}")
    if len(text) > C_SIZE_LIMIT:
        raise ValueError(f"{path} is larger than {C_SIZE_LIMIT >> 20} MiB, too large for a function")
    call = function.call(operands)
    products = integers_of_c(text, path.parent, call, operands, f"{path}:{function.name}")
    width = 2 * operands.bits
    if not _is_unsigned(function.result):
        return _Found(products, {width}, False)
    if not operands.signed:
        return _Found(products.view(np.uint64), set(), False)
    patterns = products & ((1 << width) - 1)
    return _Found(np.where(patterns >> (width - 1), patterns - (1 << width), patterns), set(), False)


def _initialisers(plain: str, start: int) -> str:
    """Return the text from a brace to the one that closes it."""
    depth = 0
    for brace in re.compile(r"[{}]").finditer(plain, start):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return plain[start : brace.end()]
    return plain[start:]


def _c_numbers(words: str, where: str) -> list[int]:
    numbers = []
    for word in re.split(r"[{},]", words):
        if not word.strip():
            continue
        match = _C_NUMBER.fullmatch(word.strip())
        if match is None:
            raise ValueError(f"{where} has {' '.join(word.split())[:40]!r} among its numbers")
        digits = match["decimal"]
        octal = digits is not None and len(digits) > 1 and digits.startswith("0")
        try:
            size = int(match["hex"], 16) if digits is None else int(digits, 8 if octal else 10)
        except ValueError:
            raise ValueError(f"{where} has {word.strip()[:40]!r} among its numbers") from None
        numbers.append(-size if word.strip().startswith("-") else size)
    return numbers


def costs_of(text: str) -> dict[str, str]:
    """Return power, area and delay of a circuit, with their units, from the comments of its source.

    What their names begin with, as in ``PDK45_PWR``, is the ``process``.
    """
    costs: dict[str, str] = {}
    for comment in re.findall(_COMMENT, text, re.DOTALL):
        for match in _COST.finditer(comment):
            if match["process"]:
                costs.setdefault("process", match["process"])
            name = match["name"].lower().replace("pwr", "power")
            costs.setdefault(name, f"{match['figure'].rstrip('.')} {match['unit'] or ''}".rstrip())
    return costs


# Writing


def write(table: IntegerTable, path: Path) -> str:
    """Write a table as .npy, int32 by bit patterns, whole or not at all; return the name that reads it.

    Raises:
        ValueError: another suffix, or the file cannot be written.
    """
    if path.suffix != ".npy":
        raise ValueError(f"{path}: name a .npy file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.save(file, table.entries)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    distances = _distance(table.entries, table.operands), _distance(_by_codes(table.entries), table.operands)
    is_clear = not table.operands.signed or _clear_order(*distances) == CODES
    return f"{table.operands}:{path}{'' if is_clear else f'@{CODES}'}"
