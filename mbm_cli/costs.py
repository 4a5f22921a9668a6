"""What multipliers cost: ratios to the exact multiplier of the same operands in the same source (docs/search.md)."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from mbm_cli.documents import read_yaml
from mbm_cli.errors import RequestError
from mbm_cli.multipliers.integer import IntegerTable
from mbm_cli.multipliers.names import Multiplier

Quantity = Literal["power", "area", "delay", "energy"]
QUANTITIES: tuple[Quantity, ...] = ("power", "area", "delay", "energy")
_FIGURE = re.compile(r"(?P<value>[0-9.]+(?:e[-+]?[0-9]+)?) *(?P<unit>[^0-9\s]\S*)?", re.IGNORECASE)


class Figure(NamedTuple):
    """A number above 0 and its unit, empty for a ratio."""

    value: float
    unit: str

    @classmethod
    def of(cls, value: object) -> Self:
        """Convert ``0.425 mW`` or a number.

        Raises:
            ValueError: something else.
        """
        match = _FIGURE.fullmatch(str(value).strip())
        try:
            number = float(match["value"]) if match else 0.0
        except ValueError:
            number = 0.0
        if match is None or not 0 < number < math.inf:
            raise ValueError(
                f"a figure is a number above 0, with its unit if it has one, for example 0.425 mW: {value!r}"
            )
        return cls(number, match["unit"] or "")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


_FigureField = Annotated[Figure | None, BeforeValidator(Figure.of)]
_Text = Annotated[str, Field(min_length=1)]


class Figures(_Strict):
    """Figures of one multiplier, and where its source has them."""

    where: _Text
    power: _FigureField = None
    area: _FigureField = None
    delay: _FigureField = None
    energy: _FigureField = None

    def known(self) -> dict[Quantity, Figure]:
        return {name: figure for name in QUANTITIES if (figure := getattr(self, name)) is not None}


class Source(_Strict):
    """What one source reports about multipliers of one kind of operands.

    Attributes:
        source, technology: the publication, and what its circuits were made for.
        operands: ``float32``, ``int8``, ``uint8``, ...
        exact: of the exact multiplier, by which the others are divided.
        process: begins the names of figures in the comments of circuits' files that this source has made.
        multipliers: others by their names, those of files without folders.
    """

    source: _Text
    technology: _Text
    operands: Annotated[str, Field(pattern="float32|u?int[0-9]{1,2}")]
    exact: Figures
    process: str | None = None
    multipliers: dict[str, Figures] = {}

    @model_validator(mode="after")
    def _compare(self) -> Self:
        """Raise ValueError for a multiplier that cannot be compared with the exact one."""
        for name, figures in self.multipliers.items():
            operands = operands_of(Multiplier.parse(name))
            if operands != self.operands:
                raise ValueError(f"{name} multiplies {operands}, not {self.operands}")
            for quantity, figure in figures.known().items():
                exact = self.exact.known().get(quantity)
                if exact is None or exact.unit != figure.unit:
                    has = f"is in {exact.unit or 'no unit'}" if exact else "is missing"
                    raise ValueError(f"{name}: {quantity} is in {figure.unit or 'no unit'}, but the exact one's {has}")
        return self

    def ratio(self, multiplier: Multiplier, quantity: Quantity) -> float | None:
        """Return the figure of a resolved multiplier, divided by that of the exact one; ``None`` if there is none."""
        exact = self.exact.known().get(quantity)
        if operands_of(multiplier) != self.operands or exact is None:
            return None
        if str(multiplier) in ("exact", f"exact-{self.operands}"):
            return 1.0
        figures = self.multipliers.get(label(multiplier))
        figure = figures.known().get(quantity) if figures else self._in_file(multiplier, quantity)
        return figure.value / exact.value if figure and figure.unit == exact.unit else None

    def _in_file(self, multiplier: Multiplier, quantity: Quantity) -> Figure | None:
        """Return the figure that a circuit's file carries, if it is of this source."""
        table = multiplier.content
        if self.process is None or not isinstance(table, IntegerTable) or table.costs.get("process") != self.process:
            return None
        return Figure.of(table.costs[quantity]) if quantity in table.costs else None

    def where(self, multiplier: Multiplier) -> str:
        """Return where the source has the figures of a multiplier."""
        figures = self.multipliers.get(label(multiplier))
        return figures.where if figures else self.exact.where if not multiplier.is_file else "its file"


@dataclass(frozen=True)
class Cost:
    """What one source says about a multiplier: figures by quantity, the exact multiplier's being 1."""

    multiplier: str
    figures: dict[str, float]
    source: str
    technology: str
    where: str


@dataclass(frozen=True)
class Prices:
    """The sources of costs, those of the user first, and the quantity that counts."""

    sources: tuple[Source, ...]
    quantity: Quantity = "power"

    @classmethod
    def load(cls, file: Path | None = None, quantity: Quantity = "power") -> Self:
        """Read the package's ``costs.yaml``, and a user's file of the same form.

        Raises:
            RequestError: the file cannot be read, or something in it is wrong.
        """
        return cls((*(_read(file) if file else ()), *_shipped()), quantity)

    def of(self, multiplier: Multiplier) -> list[Cost]:
        """Return what each source says about a resolved multiplier."""
        found = []
        for source in self.sources:
            ratios = [(str(quantity), source.ratio(multiplier, quantity)) for quantity in QUANTITIES]
            if figures := {name: ratio for name, ratio in ratios if ratio is not None}:
                found.append(
                    Cost(label(multiplier), figures, source.source, source.technology, source.where(multiplier))
                )
        return found

    def reported(self) -> list[Cost]:
        """Return what the sources say about the multipliers that they name."""
        return [cost for source in self.sources for name in source.multipliers for cost in self._named(source, name)]

    def _named(self, source: Source, name: str) -> list[Cost]:
        return Prices((source,)).of(Multiplier.parse(name))

    def common(self, multipliers: Sequence[Multiplier]) -> tuple[str, list[float]]:
        """Return what the costs are, in words, and the cost of each resolved multiplier, all of one source.

        Raises:
            RequestError: no source has them all; the message names those without a cost.
        """
        best: list[str] = [label(one) for one in multipliers]
        for source in self.sources:
            ratios = [source.ratio(one, self.quantity) for one in multipliers]
            missing = [label(one) for one, ratio in zip(multipliers, ratios, strict=True) if ratio is None]
            if not missing:
                return self.describe(source), [ratio for ratio in ratios if ratio is not None]
            best = min(best, missing, key=len)
        raise RequestError(
            f"no source has the {self.quantity} of {', '.join(best)} beside the others: "
            "name a file that has all of them, --costs FILE"
        )

    def of_networks(self, networks: Sequence[Mapping[Multiplier, int]]) -> tuple[str | None, list[float | None]]:
        """Return the cost of networks, of which the number of products by multiplier is known; an exact one costs 1.

        All costs are of the one source that has most of them, which the first result names; the others are ``None``.
        """
        best: tuple[str | None, list[float | None]] = None, [None] * len(networks)
        for source in self.sources:
            costs = [self._of_network(source, network) for network in networks]
            if sum(cost is not None for cost in costs) > sum(cost is not None for cost in best[1]):
                best = self.describe(source), costs
        return best

    def _of_network(self, source: Source, network: Mapping[Multiplier, int]) -> float | None:
        costs = [(products, source.ratio(one, self.quantity)) for one, products in network.items()]
        known = [(products, ratio) for products, ratio in costs if ratio is not None]
        total = sum(products for products, _ in costs)
        return (
            sum(products * ratio for products, ratio in known) / total if total and len(known) == len(costs) else None
        )

    def describe(self, source: Source) -> str:
        return f"{self.quantity}, exact = 1 ({source.source}; {source.technology})"


def label(multiplier: Multiplier) -> str:
    """Return a multiplier's name, of a file without its folders."""
    return str(replace(multiplier, file=os.path.basename(multiplier.file))) if multiplier.file else str(multiplier)


def operands_of(multiplier: Multiplier) -> str:
    """Return the kind of a multiplier's operands: ``float32``, ``int8``, ..."""
    return "float32" if multiplier.operands is None else str(multiplier.operands)


@cache
def _shipped() -> tuple[Source, ...]:
    text = (resources.files("mbm_cli") / "costs.yaml").read_text(encoding="utf-8")
    return _parse(read_yaml(text, "costs.yaml"), "costs.yaml")


def _read(file: Path) -> tuple[Source, ...]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RequestError(f"--costs {file} cannot be read: {reason}") from None
    return _parse(read_yaml(text, f"--costs {file}"), f"--costs {file}")


def _parse(document: Any, where: str) -> tuple[Source, ...]:
    try:
        return tuple(TypeAdapter(dict[str, Source]).validate_python(document).values())
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(f"{where}: {path + ': ' if path else ''}{message}") from None
