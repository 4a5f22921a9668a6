"""Which multiplier each layer of a model gets."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mbm_cli.multipliers import Multiplier

DEFAULT = "default"

_PLAIN = re.compile(r"[A-Za-z0-9_./~-](?:[A-Za-z0-9_./~*?@-]|:(?! ))*")


def _word(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


@dataclass(frozen=True)
class LayerMultipliers:
    """Multipliers by the layers' names.

    Attributes:
        default: of the layers that nothing else names.
        layers: names or patterns (``*``, ``?``, ``[...]``) with their multipliers; a name wins over a pattern, an
            earlier pattern over a later one.
    """

    default: Multiplier
    layers: tuple[tuple[str, Multiplier], ...]

    @classmethod
    def of_mapping(cls, mapping: Mapping[str, "Multiplier | str"]) -> "LayerMultipliers":
        """From layer names and patterns to multipliers, with one for ``default``.

        Raises:
            ValueError: something in it is not a multiplier, or there is no default.
        """
        if DEFAULT not in mapping:
            raise ValueError(f"multipliers by layer need one for the others, too: {DEFAULT}: mbm")
        parsed = {
            layer: Multiplier.parse(value) if isinstance(value, str) else value for layer, value in mapping.items()
        }
        wrong = [layer for layer, value in parsed.items() if not isinstance(value, Multiplier)]
        if wrong:
            raise ValueError(f"the multiplier of {wrong[0]} is {mapping[wrong[0]]!r}, not a short form such as mbm-t8")
        return cls(parsed.pop(DEFAULT), tuple(parsed.items()))

    def of(self, layer: str) -> Multiplier:
        """The multiplier of the layer with this name."""
        named = dict(self.layers)
        if layer in named:
            return named[layer]
        return next((m for pattern, m in self.layers if fnmatchcase(layer, pattern)), self.default)

    def unmatched(self, layers: list[str]) -> list[str]:
        """The names and patterns that none of these layers has."""
        return [p for p, _ in self.layers if p not in layers and not any(fnmatchcase(layer, p) for layer in layers)]

    def distinct(self) -> list[Multiplier]:
        """Each multiplier that some layer may get, once."""
        return list(dict.fromkeys(self.mapping().values()))

    def mapping(self) -> dict[str, Multiplier]:
        return {**dict(self.layers), DEFAULT: self.default}

    def __str__(self) -> str:
        """As a config can have it: ``{conv1: exact, default: mbm}``; quoted where YAML could misread a word."""
        return "{" + ", ".join(f"{_word(layer)}: {_word(str(m))}" for layer, m in self.mapping().items()) + "}"

    @property
    def is_exact(self) -> bool:
        return all(multiplier.is_exact for multiplier in self.mapping().values())
