"""Names of multipliers: text to `Multiplier` and back. Reads no file, runs no code, imports no PyTorch."""

import json
import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Self

from mbm_cli.errors import clip, did_you_mean
from mbm_cli.multipliers.float32 import FAMILIES, FRACTION_BITS
from mbm_cli.multipliers.integer import CHARACTERIZED, MOST_TRUNCATED, WIDTHS, Operands

FILES = {  # families whose product a file defines, and how they are named
    "lut": "lut:FILE",
    "python": "python:FILE.py:function",
    "c": "c:FILE.h:function",
}
CODE = ("python", "c")  # families that run what is in the file
INTEGER_FAMILIES = {"exact": "", "drum": "k", "mbm": "t", "mitchell": "t"}  # with the letters of their parameters
INTEGER_FILES = (".c", ".h", ".py", ".npy", ".txt", ".bin")
ORDERS = ("codes", "sorted", "transposed")  # of a file's table, where its content does not tell
DEFAULT = "default"

_SHORT_FORM = re.compile(r"(?P<family>[a-z]+)(?:-(?P<parameter>[tk])(?P<n>[0-9]{1,3}))?(?:-r(?P<r>[0-9]{1,3}))?")
_INTEGER_FORM = re.compile(
    r"(?P<family>[a-z]+)-(?P<unsigned>u?)int(?P<bits>[0-9]{1,3})(?:-(?P<parameter>[a-z])(?P<n>[0-9]{1,3}))?"
)
_INTEGER_FILE = re.compile(r"(?P<unsigned>u?)int(?P<bits>[0-9]{1,3}):(?P<reference>.*)", re.DOTALL)
_ORDER = re.compile(rf"(?P<reference>.*)@(?P<order>{'|'.join(ORDERS)})", re.DOTALL)
_BITS = re.compile(r"(?P<reference>.*)@(?P<bits>[0-9]{1,3})", re.DOTALL)
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN_WORD = re.compile(r"[A-Za-z0-9_./~-](?:[A-Za-z0-9_./~*?@-]|:(?! ))*")


@dataclass(frozen=True)
class Multiplier:
    """A float32 multiplier: a family of products with its parameters, or a file that defines the product.

    Attributes:
        family: ``exact``, ``mitchell``, ``mbm`` or ``drum``; ``lut``, ``python`` or ``c`` for a file.
        truncate: low fraction bits dropped from each operand, 0..22. ``drum`` with k leading bits drops 24 - k.
        result_bits: fraction bits kept in the product, 1..23; ``None`` keeps all 23.
        file, function, bits: of a file, as written: its path, the function in it, the fraction bits of its table.
        content: what the file holds, once `mbm_cli.resolve` has read it: a ``Table``, or a ``Function`` in C.
        operands: the format of an integer multiplier's operands; ``None`` for float32.

    Raises:
        ValueError: a family or a number outside of these.
    """

    family: str
    truncate: int = 0
    result_bits: int | None = None
    file: str = ""
    function: str = ""
    bits: int | None = None
    content: Any = field(default=None, repr=False)
    operands: Operands | None = None

    def __post_init__(self) -> None:
        if self.is_file:
            return
        if self.family not in FAMILIES:
            raise ValueError(f"unknown multiplier family {self.family!r}: the families are {', '.join(FAMILIES)}")
        allowed = FAMILIES[self.family].truncations
        if type(self.truncate) is not int or self.truncate not in allowed:
            if FAMILIES[self.family].parameter == "k":
                raise ValueError(
                    f"{self.family} keeps {FRACTION_BITS + 1 - allowed[-1]} to {FRACTION_BITS + 1 - allowed[0]} "
                    f"leading bits, for example {self.family}-k6"
                )
            raise ValueError(f"truncate is {self.truncate}, but {allowed[0]} to {allowed[-1]} fraction bits can go")
        if self.result_bits is None:
            return
        if type(self.result_bits) is not int or not 1 <= self.result_bits <= FRACTION_BITS:
            raise ValueError(f"result_bits is {self.result_bits}, but 1 to {FRACTION_BITS} fraction bits can be kept")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a multiplier's name; read nothing.

        ``family[-tT][-rR]`` and ``drum-kK[-rR]`` are short forms, for example ``mbm-t16-r7``. ``lut:FILE`` names a
        table, ``python:FILE.py:function`` a function to tabulate (for 7-bit fractions, or m with ``@m`` behind it),
        ``c:FILE.h:function`` a function to compile.

        Raises:
            ValueError: the text has none of these forms, or a number is out of range.
        """
        family, colon, reference = text.partition(":")
        if colon and family in FILES:
            return cls._parse_file(family, reference)
        if integers := IntegerMultiplier.of_text(text):
            return integers  # type: ignore[return-value]
        match = _SHORT_FORM.fullmatch(text)
        bare = re.fullmatch(r"([a-z]+)-([0-9]{1,3})", text)
        if bare is not None and bare[1] in FAMILIES:
            likely = f"{bare[1]}-{FAMILIES[bare[1]].parameter}{bare[2]}"
            raise ValueError(f"{text!r} is not a multiplier; did you mean {likely}?")
        if match is None:
            raise ValueError(
                f"{text!r} is not a multiplier: write family[-tT][-rR] with a family of "
                f"{', '.join(FAMILIES)}, for example mbm, mbm-t8 or mbm-t16-r7, or {', '.join(FILES.values())}; "
                "of integers exact-int8, drum-int8-k4 or int8:FILE"
            )
        family, number = match["family"], int(match["n"] or 0)
        if match["parameter"] and family in FAMILIES and FAMILIES[family].parameter != match["parameter"]:
            raise ValueError(
                f"{text!r} is not a multiplier: {family} takes -{FAMILIES[family].parameter}, not -"
                + match["parameter"]
            )
        truncate = FRACTION_BITS + 1 - number if match["parameter"] == "k" else number
        return cls(family, truncate, None if match["r"] is None else int(match["r"]))

    @classmethod
    def _parse_file(cls, family: str, reference: str) -> Self:
        if family == "lut":
            return cls(family, file=reference)
        bits = _BITS.fullmatch(reference)
        file, _, function = (bits["reference"] if bits else reference).rpartition(":")
        if not file or not _IDENTIFIER.fullmatch(function):
            raise ValueError(f"{family}:{reference}: write the file and its function, {FILES[family]}")
        return cls(family, file=file, function=function, bits=int(bits["bits"]) if bits else None)

    @property
    def is_file(self) -> bool:
        """Whether a file defines the product."""
        return self.family in FILES

    @property
    def runs_code(self) -> bool:
        """Whether its file is run or compiled."""
        return self.family in CODE

    @property
    def is_integer(self) -> bool:
        """Whether operands are integers, so that a layer quantises them."""
        return self.operands is not None

    @property
    def is_exact(self) -> bool:
        """Whether the product is IEEE 754's own, with nothing dropped from operands or result."""
        return self.family == "exact" and self.truncate == 0 and self.result_bits in (None, FRACTION_BITS)

    @property
    def key(self) -> str:
        """Content key: equal keys are equal products, whatever happens to files. Files must have been resolved."""
        if not self.is_file:
            return str(self)
        if self.content is None:
            raise ValueError(f"{self} has not been read: mbm_cli.resolve reads it")
        return f"{self.family}:{self.content.digest}"

    @property
    def located(self) -> str:
        """The name with the file's absolute path, which is valid in any folder."""
        return str(self) if not self.is_file else self._name(os.path.abspath(os.path.expanduser(self.file)))

    def __str__(self) -> str:
        if self.is_file:
            return self._name(self.file)
        parameter = FAMILIES[self.family].parameter
        number = FRACTION_BITS + 1 - self.truncate if parameter == "k" else self.truncate
        operands = f"-{parameter}{number}" if number else ""
        result_bits = "" if self.result_bits is None else f"-r{self.result_bits}"
        return f"{self.family}{operands}{result_bits}"

    def _name(self, file: str) -> str:
        function = f":{self.function}" if self.function else ""
        return f"{self.family}:{file}{function}{'' if self.bits is None else f'@{self.bits}'}"

    def distinct(self) -> "list[Multiplier]":
        """Return this multiplier alone, in the form of `LayerMultipliers.distinct`."""
        return [self]


INT8 = Operands(8, signed=True)


@dataclass(frozen=True)
class IntegerMultiplier(Multiplier):
    """An integer multiplier: a built-in family for a format of operands, or a file with its table or its function.

    Attributes:
        family: ``exact``, ``drum``, ``mbm`` or ``mitchell``; the format's name for a file.
        truncate: low fraction bits dropped from each operand of ``mbm`` and ``mitchell``.
        operands: the format of both operands.
        leading_bits: of ``drum``, those that each operand keeps.
        order: what a file's table is said to be: ``codes``, ``sorted``, ``transposed``.
        content: its ``IntegerTable``, once `mbm_cli.resolve` has made or read it.

    Raises:
        ValueError: a family, a format or a number outside of these.
    """

    operands: Operands = INT8
    leading_bits: int = 0
    order: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        bits, characterized = self.operands.bits, self.operands == Operands(CHARACTERIZED, signed=False)
        if bits not in WIDTHS and not (characterized and not self.is_file):
            raise ValueError(f"{self}: operands have {WIDTHS[0]} to {WIDTHS[-1]} bits, not {bits}")
        if self.is_file:
            return
        if self.family not in INTEGER_FAMILIES:
            raise ValueError(f"{self}: the families of integer multipliers are {', '.join(INTEGER_FAMILIES)}")
        if INTEGER_FAMILIES[self.family] == "t":
            if bits != 8 and not characterized:
                only = "8 bits (unsigned 16 for mbm characterize)"
                raise ValueError(f"{self}: {self.family} multiplies operands of {only}, not {bits}")
            most = min(MOST_TRUNCATED, bits - 2)
            if not 0 <= self.truncate <= most:
                raise ValueError(f"{self}: 0 to {most} fraction bits can go from {self.operands}, not {self.truncate}")
        elif characterized:
            raise ValueError(f"{self}: {self.family} multiplies operands of up to {WIDTHS[-1]} bits, not {bits}")
        elif self.family == "drum" and not 2 <= self.leading_bits < bits:
            example = f", for example drum-{self.operands}-k{min(4, bits - 1)}" if bits > 2 else ""
            raise ValueError(
                f"{self}: drum keeps at least 2 leading bits, and fewer than the {bits} of {self.operands}{example}"
            )

    @classmethod
    def of_text(cls, text: str) -> "IntegerMultiplier | None":
        """Parse ``family-intN[-tT]``, ``drum-intN-kK`` or ``intN:FILE[:function][@order]``; ``None`` for other texts.

        Raises:
            ValueError: one of these, but wrong.
        """
        if match := _INTEGER_FILE.fullmatch(text):
            return cls._of_file(Operands(int(match["bits"]), not match["unsigned"]), match["reference"])
        match = _INTEGER_FORM.fullmatch(text)
        if match is None:
            return None
        family, parameter, number = match["family"], match["parameter"], int(match["n"] or 0)
        operands = Operands(int(match["bits"]), not match["unsigned"])
        if parameter and family in INTEGER_FAMILIES and parameter != INTEGER_FAMILIES[family]:
            takes = f"takes -{INTEGER_FAMILIES[family]}" if INTEGER_FAMILIES[family] else "has no parameter"
            raise ValueError(f"{text!r} is not a multiplier: {family} {takes}, not -{parameter}")
        truncate, leading = (0, number) if parameter == "k" else (number, 0)
        return cls(family, truncate, operands=operands, leading_bits=leading)

    @classmethod
    def _of_file(cls, operands: Operands, reference: str) -> "IntegerMultiplier":
        order: list[str] = []
        while match := _ORDER.fullmatch(reference):
            reference = match["reference"]
            order.insert(0, match["order"])
        head, colon, function = reference.rpartition(":")
        if not colon or not _IDENTIFIER.fullmatch(function):
            head, function = reference, ""
        suffix = os.path.splitext(head)[1].lower()
        if suffix not in INTEGER_FILES:
            raise ValueError(
                f"{operands}:{reference}: write {operands}:FILE with a file {', '.join(INTEGER_FILES)}, "
                f"for example {operands}:mul8s_1KVL.c"
            )
        if (suffix == ".py") > bool(function) or (function and suffix not in (".py", ".c", ".h")):
            what = "its function, FILE.py:function" if suffix == ".py" else "the file alone: it holds no function"
            raise ValueError(f"{operands}:{reference}: write {what}")
        return cls(str(operands), file=head, function=function, operands=operands, order=tuple(order))

    @property
    def is_file(self) -> bool:
        return bool(self.file)

    @property
    def runs_code(self) -> bool:
        return os.path.splitext(self.file)[1].lower() in (".c", ".h", ".py")

    @property
    def is_exact(self) -> bool:
        """False: the product may be exact, but its operands are quantised."""
        return False

    def __str__(self) -> str:
        if self.is_file:
            return self._name(self.file)
        letter = INTEGER_FAMILIES.get(self.family)
        parameter = f"-k{self.leading_bits}" if letter == "k" else f"-t{self.truncate}" if self.truncate else ""
        return f"{self.family}-{self.operands}{parameter}"

    def _name(self, file: str) -> str:
        function = f":{self.function}" if self.function else ""
        return f"{self.operands}:{file}{function}{''.join(f'@{one}' for one in self.order)}"


KINDS = ("conv2d", "linear")  # of layers that have a multiplier


@dataclass(frozen=True)
class LayerMultipliers:
    """Multipliers by layer: a name wins over a pattern, an earlier pattern over a later one, a pattern over a kind.

    A layer that nothing names is exact.

    Attributes:
        layers: names, patterns (``*``, ``?``, ``[...]``) and kinds (``conv2d``, ``linear``) with their multipliers.
            ``default`` stands for the convolutions that nothing else names.
        dense_patterns: whether patterns match dense layers, too.
    """

    layers: tuple[tuple[str, Multiplier], ...]
    dense_patterns: bool = True

    @classmethod
    def of_mapping(cls, mapping: Mapping[str, Multiplier | str], dense_patterns: bool = True) -> Self:
        """Convert a mapping from layers to multipliers.

        Raises:
            ValueError: a value is not a multiplier, or there is none.
        """
        if not mapping:
            raise ValueError(f"no layer is named: write {{conv1: mbm}}, or {{{DEFAULT}: mbm}} for all convolutions")
        parsed = {
            layer: Multiplier.parse(value) if isinstance(value, str) else value for layer, value in mapping.items()
        }
        wrong = [layer for layer, value in parsed.items() if not isinstance(value, Multiplier)]
        if wrong:
            raise ValueError(f"the multiplier of {wrong[0]} is {mapping[wrong[0]]!r}, not a short form such as mbm-t8")
        default = [(DEFAULT, parsed.pop(DEFAULT))] if DEFAULT in parsed else []
        return cls((*parsed.items(), *default), dense_patterns)

    def of(self, layer: str, kind: str) -> Multiplier:
        """Return the multiplier of the layer with this name and kind."""
        return self.naming(layer, kind) or dict(self.layers).get(DEFAULT if kind == "conv2d" else "", EXACT)

    def naming(self, layer: str, kind: str) -> Multiplier | None:
        """Return what a name, a pattern or a kind, and not the default, decides for a layer."""
        mapping = dict(self.layers)
        if layer in mapping:
            return mapping[layer]
        of_pattern = (m for pattern, m in self.layers if self._matches(pattern, layer, kind))
        return next(of_pattern, None) or mapping.get(kind)

    def _matches(self, pattern: str, layer: str, kind: str) -> bool:
        return (kind == "conv2d" or self.dense_patterns) and pattern not in KINDS and fnmatchcase(layer, pattern)

    def unmatched(self, layers: Mapping[str, str]) -> list[str]:
        """Return the names, patterns and kinds that match none of these layers, given with their kinds."""
        return [
            name
            for name, _ in self.layers
            if name not in (DEFAULT, *layers, *layers.values())
            and not any(self._matches(name, layer, kind) for layer, kind in layers.items())
        ]

    def distinct(self) -> list[Multiplier]:
        """Return each multiplier once."""
        return list(dict.fromkeys(multiplier for _, multiplier in self.layers))

    @property
    def located(self) -> dict[str, str]:
        """The mapping as a config has it, with absolute paths of files."""
        return {layer: multiplier.located for layer, multiplier in self.layers}

    def __str__(self) -> str:
        """Write the mapping as a config can have it: ``{conv1: exact, default: mbm}``."""
        return "{" + ", ".join(f"{_word(layer)}: {_word(str(m))}" for layer, m in self.layers) + "}"

    @property
    def is_exact(self) -> bool:
        return all(multiplier.is_exact for multiplier in self.distinct())


EXACT = Multiplier("exact")
SAME = "same"


@dataclass(frozen=True)
class Backward:
    """The multipliers of the gradients of a layer's input and of its weight; ``None`` is the layer's own multiplier."""

    input: Multiplier | None = EXACT
    weight: Multiplier | None = EXACT

    @classmethod
    def of(cls, value: object) -> Self:
        """Convert one multiplier for both gradients, ``same`` for the layer's own, or ``{input: ..., weight: ...}``.

        A gradient that a mapping leaves out is exact.

        Raises:
            ValueError: something else.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping) and not value.keys() & _FIELDS.keys():
            unknown = [name for name in value if name not in ("input", "weight")]
            if unknown or not value:
                problem = f"unknown gradient {unknown[0]!r}" if unknown else "no gradient is named"
                raise ValueError(f"{problem}: a layer has two, {{input: mbm, weight: exact}}")
            return cls(**{name: None if one == SAME else _gradient(one) for name, one in value.items()})
        one = None if value == SAME else _gradient(value)
        return cls(one, one)

    def of_layer(self, forward: Multiplier) -> tuple[Multiplier, Multiplier]:
        """Return the multipliers for a layer with this forward multiplier."""
        gradients = self.input or forward, self.weight or forward
        if any(one.is_integer for one in gradients):
            raise ValueError(_NO_INTEGERS.format("same" if forward in gradients else self))
        return gradients

    def distinct(self) -> list[Multiplier]:
        """Return each multiplier that is named, once."""
        return list(dict.fromkeys(one for one in (self.input, self.weight) if one is not None))

    @property
    def is_exact(self) -> bool:
        return all(one is not None and one.is_exact for one in (self.input, self.weight))

    @property
    def located(self) -> str | dict[str, str]:
        """What a config has, with absolute paths of files."""
        input, weight = (SAME if one is None else one.located for one in (self.input, self.weight))
        return input if input == weight else {"input": input, "weight": weight}

    def __str__(self) -> str:
        """Write what a config can have: ``mbm``, ``same`` or ``{input: mbm, weight: exact}``."""
        input, weight = (SAME if one is None else str(one) for one in (self.input, self.weight))
        return input if input == weight else f"{{input: {_word(input)}, weight: {_word(weight)}}}"


_NO_INTEGERS = "{}: gradients take a float multiplier, for example mbm, because they are not quantised"


def _gradient(value: object) -> Multiplier:
    one = _one_of(value)
    if one.is_integer:
        raise ValueError(_NO_INTEGERS.format(one))
    return one


def multiplier_of(value: object, dense_patterns: bool = True) -> Multiplier | LayerMultipliers:
    """Convert what a config may hold: a name, a mapping such as ``{family: mbm, truncate: 8}``, or one by layer.

    Args:
        dense_patterns: as `LayerMultipliers` has it.

    Raises:
        ValueError: something else, with what is allowed.
    """
    if isinstance(value, LayerMultipliers):
        return value
    if isinstance(value, dict) and (DEFAULT in value or not value.keys() & _FIELDS.keys()):
        return LayerMultipliers.of_mapping({layer: _one_of(one) for layer, one in value.items()}, dense_patterns)
    return _one_of(value)


def _one_of(value: object) -> Multiplier:
    if isinstance(value, Multiplier):
        return value
    if isinstance(value, dict):
        value = _short_form(value)
    if not isinstance(value, str):
        raise ValueError(
            f"must be a short form such as mbm-t8 or a mapping such as {{family: mbm}} or "
            f"{{conv1: exact, {DEFAULT}: mbm}}, not {clip(reprlib.repr(value), 60)}"
        )
    try:
        return Multiplier.parse(value)
    except ValueError as error:
        family = value.partition("-")[0].partition(":")[0]
        known = family in FAMILIES or family in FILES
        hint = "" if known or "did you mean" in str(error) else did_you_mean(family, FAMILIES)
        raise ValueError(clip(str(error), 250) + hint) from None


# Fields of a multiplier's mapping, and how its short form writes them.
_FIELDS = {"family": "", "truncate": "-t", "leading_bits": "-k", "result_bits": "-r"}


def _short_form(fields: dict[str, object]) -> str:
    given = {name: value for name, value in fields.items() if value is not None and (name, value) != ("truncate", 0)}
    unknown = [name for name in given if name not in _FIELDS]
    if unknown or "family" not in given:
        problem = f"unknown field {unknown[0]!r}" if unknown else "family is missing"
        raise ValueError(f"{problem}: a multiplier's fields are {', '.join(_FIELDS)}")
    if given["family"] not in FAMILIES:
        raise ValueError(
            f"family must be {' | '.join(FAMILIES)}, not {given['family']!r}{did_you_mean(given['family'], FAMILIES)}"
        )
    for name, value in given.items():
        if name != "family" and (type(value) is not int or value < 0):
            raise ValueError(f"{name} must be null or a whole number, not {value!r}")
    return "".join(f"{prefix}{given[name]}" for name, prefix in _FIELDS.items() if name in given)


def _word(text: str) -> str:
    """Quote a word that YAML could misread."""
    return text if _PLAIN_WORD.fullmatch(text) else json.dumps(text, ensure_ascii=False)


class Name(NamedTuple):
    """A kind of multiplier as users name it."""

    name: str
    what: str
    example: str


NAMES = (
    *(
        Name(
            f"{name}-{family.parameter}N[-rR]" if family.parameter == "k" else f"{name}[-{family.parameter}N][-rR]",
            family.what,
            family.example,
        )
        for name, family in FAMILIES.items()
    ),
    Name("lut:FILE", "a table: .bin (up to 7 fraction bits) or .npy (up to 11)", "lut:mbm.bin"),
    Name(
        "python:FILE.py:function[@M]", "a function in Python, tabulated for M fraction bits", "python:my.py:product@7"
    ),
    Name("exact-intN, exact-uintN", "exact products of quantised operands of N bits, 2 to 8", "exact-int8"),
    Name("drum-intN-kK", "DRUM on integers; also -uintN", "drum-int8-k4"),
    Name("mbm-int8[-tT], mitchell-int8[-tT]", "their integer forms; also -uint8", "mbm-int8"),
    Name(
        "int8:FILE", "an 8-bit circuit: .c, .h, .npy, .txt, .bin or .py:function; also uint8:, int4:, ...", "int8:mul.c"
    ),
    Name("c:FILE.h:function[@M]", "a function in C, compiled; with @M tabulated, which is faster", "c:my.h:product"),
)
PARAMETERS = "-tN drops the N low fraction bits of the operands, -rR keeps R fraction bits of the product"
