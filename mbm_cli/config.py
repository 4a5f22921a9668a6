"""The typed experiment: YAML in, checked, overridden, written out again."""

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
)
from pydantic.fields import FieldInfo

from mbm_cli.errors import RequestError
from mbm_cli.layer_multipliers import DEFAULT, LayerMultipliers
from mbm_cli.multipliers import CODE, FAMILIES, FRACTION_BITS, USERS, Multiplier

_SIZE_LIMIT = 1 << 20  # bytes; a config is about one thousand
_DEPTH_LIMIT = 10  # a config needs 3 levels; the YAML reader recurses once a level
_COUNT_LIMIT = 2**31 - 1  # what PyTorch takes as a size on every platform

# Where a type alone does not say what is allowed, the description does: it completes the sentence
# "<field> must be ...". Choices and sections describe themselves (_allowed).
Count = Annotated[int, Field(ge=1, le=_COUNT_LIMIT, description=f"a whole number from 1 to {_COUNT_LIMIT}")]
Limit = Annotated[
    int | None, Field(ge=1, le=_COUNT_LIMIT, description=f"null (all) or a whole number from 1 to {_COUNT_LIMIT}")
]
Steps = Annotated[
    int | None, Field(ge=1, le=_COUNT_LIMIT, description=f"null (never) or a whole number from 1 to {_COUNT_LIMIT}")
]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="a whole number from 0 to 2^63 - 1")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, description="a finite number above 0")]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, description="a finite number, at least 0")]
Fraction = Annotated[float, Field(ge=0, lt=1, description="a number, at least 0 and below 1")]
Switch = Annotated[bool, Field(description="true or false")]
Folder = Annotated[
    str | None, Field(min_length=1, pattern=r"^[^\x00]*$", description="null (the user's cache folder) or a folder")
]
# A name becomes a part of the run folder's name.
Name = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$",
        description="a text of at most 64 letters, digits, '.', '_' or '-' that does not begin with '.'",
    ),
]


class _Section(BaseModel):
    # Strict: 3.0, "3" and true are no whole numbers, "yes" is no switch.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _MultiplierFields(_Section):
    """A multiplier as a mapping; the short form is the other way to write it."""

    family: Literal[tuple(FAMILIES)]  # type: ignore[valid-type]  # a type checker knows no tables
    truncate: Annotated[
        int, Field(ge=0, lt=FRACTION_BITS, description=f"a whole number from 0 to {FRACTION_BITS - 1}")
    ] = 0
    leading_bits: Annotated[
        int | None, Field(ge=2, le=FRACTION_BITS, description=f"null or a whole number from 2 to {FRACTION_BITS}")
    ] = None
    result_bits: Annotated[
        int | None, Field(ge=1, le=FRACTION_BITS, description=f"null or a whole number from 1 to {FRACTION_BITS}")
    ] = None


def _to_multiplier(value: object) -> Multiplier | LayerMultipliers:
    """A multiplier from its short form or its mapping, or several by layer; ValueError says what is allowed."""
    match value:
        case LayerMultipliers():
            return value
        case dict() if DEFAULT in value or not value.keys() & _MultiplierFields.model_fields.keys():
            return LayerMultipliers.of_mapping({layer: _to_one_multiplier(one) for layer, one in value.items()})
    return _to_one_multiplier(value)


def _to_one_multiplier(value: object) -> Multiplier:
    match value:
        case Multiplier():
            return value
        case str():
            try:
                return Multiplier.parse(value)
            except ValueError as error:
                family = value.partition("-")[0]
                known = family in FAMILIES or value.partition(":")[0] in USERS
                hint = "" if known else _did_you_mean(family, FAMILIES)
                raise ValueError(_clip(str(error), 250) + hint) from None
        case dict():
            try:
                fields = _MultiplierFields.model_validate(value)
            except ValidationError as error:
                raise ValueError(_explain_first(error, _MultiplierFields)) from None
            if fields.leading_bits is None:
                return Multiplier(fields.family, fields.truncate, fields.result_bits)
            if FAMILIES[fields.family].parameter != "k" or fields.truncate:
                raise ValueError(f"leading_bits belongs to drum, which takes no truncate: not {_show(value)}")
            return Multiplier(fields.family, FRACTION_BITS + 1 - fields.leading_bits, fields.result_bits)
    raise ValueError(
        f"must be a short form such as mbm-t8 or a mapping such as {{family: mbm}} or "
        f"{{conv1: exact, {DEFAULT}: mbm}}, not {_show(value)}"
    )


def located(value: Multiplier | LayerMultipliers) -> str | dict[str, str]:
    """As a config has it, with whole paths, so that a run can be resumed from another folder."""
    if isinstance(value, LayerMultipliers):
        return {layer: _located(one) for layer, one in value.mapping().items()}
    return _located(value)


def _located(multiplier: Multiplier) -> str:
    return multiplier.source.located if multiplier.source else str(multiplier)


MultiplierField = Annotated[Multiplier | LayerMultipliers, PlainValidator(_to_multiplier), PlainSerializer(located)]


class DataConfig(_Section):
    """The images.

    Attributes:
        dataset: ``mnist``.
        root: folder that holds ``MNIST/raw``; ``None`` is the user's cache folder.
        batch_size: images in a training step.
        eval_batch_size: images in an evaluation step; the result does not depend on it.
        train_limit: use only that many training images; ``None`` is all. More than there are is all, too.
        test_limit: the same for the test images.
    """

    dataset: Literal["mnist"] = "mnist"
    root: Folder = None
    batch_size: Count = 64
    eval_batch_size: Count = 1000
    train_limit: Limit = None
    test_limit: Limit = None


class ModelConfig(_Section):
    """The network.

    Attributes:
        name: ``lenet`` or ``cnn3``.
        multiplier: of its convolutions; given as a `Multiplier`, its short form or its mapping, or as a mapping from
            layers' names or patterns to multipliers.
    """

    name: Literal["lenet", "cnn3"] = "lenet"
    multiplier: MultiplierField = Multiplier("mbm")


class OptimizerConfig(_Section):
    """The optimizer and its learning rate over time.

    Attributes:
        name: ``adam``, ``adamw`` or ``sgd``.
        lr: learning rate at the first step.
        weight_decay: as ``torch.optim`` defines it for that optimizer.
        schedule: the learning rate falls in a straight line (``linear``) or half a cosine (``cosine``) to zero at the
            last step, or stays what it is (``none``).
        momentum: for ``sgd`` only.
        nesterov: for ``sgd`` with a momentum above 0 only.
    """

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Positive = 0.001
    weight_decay: NonNegative = 0.0
    schedule: Literal["linear", "cosine", "none"] = "linear"
    momentum: Fraction = 0.0
    nesterov: Switch = False

    @field_validator("momentum", "nesterov")
    @classmethod
    def _belongs_to_sgd(cls, value: float, info: ValidationInfo) -> float:
        # Runs only for a value that was given; a field that was itself refused is missing from info.data.
        name = info.data.get("name", "sgd")
        if name != "sgd":
            raise ValueError(f"belongs to the optimizer sgd, not to {name}: leave it out")
        if info.field_name == "nesterov" and value and info.data.get("momentum") == 0:
            raise ValueError("needs a momentum above 0")
        return value

    @model_serializer(mode="wrap")
    def _only_own_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = serialize(self)
        return fields if self.name == "sgd" else {k: v for k, v in fields.items() if k not in ("momentum", "nesterov")}


class TrainConfig(_Section):
    """The run.

    Attributes:
        epochs: passes over the training images.
        deterministic: the same seed and device give the same weights, bit for bit; can cost speed on a GPU.
        checkpoint_every: steps between two checkpoints within an epoch; ``None`` keeps one at each epoch's end alone.
        cuda_graph: ``auto`` replays a step as a CUDA graph where that is possible, ``off`` never does.
    """

    epochs: Count = 3
    deterministic: Switch = True
    checkpoint_every: Steps = None
    cuda_graph: Literal["auto", "off"] = "auto"


class Config(_Section):
    """One experiment, complete: what ``config.yaml`` in a run's folder holds."""

    name: Name
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()


def load(source: str, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment.

    Args:
        source: path of a YAML file, or the name of a shipped config, with or without ``.yaml``; a file wins.
        overrides: ``section.field=value``, the value as YAML; a later one wins over an earlier one.

    Raises:
        RequestError: there is no such config, or something in it or in an override is wrong.
    """
    if not os.path.isfile(source) and source.removesuffix(".yaml") in shipped():
        return parse(shipped_text(source), source, overrides)
    try:
        with open(source, "rb") as file:
            content = file.read(_SIZE_LIMIT + 1)
    except FileNotFoundError:
        raise RequestError(f"config {_show(source)}: there is no such file, and {_no_shipped_config(source)}") from None
    except IsADirectoryError:
        raise RequestError(f"config {_show(source)} is a folder: name a YAML file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"config {_show(source)} cannot be read: {reason}") from None
    if len(content) > _SIZE_LIMIT:
        raise RequestError(f"config {_show(source)} is larger than {_SIZE_LIMIT >> 20} MiB: that is no config")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"config {_show(source)} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    return parse(text, source, overrides)


def multiplier(value: str | dict[str, str]) -> Multiplier | LayerMultipliers:
    """A multiplier's name, or ``{layer: name, default: name}``, as a text or as a mapping.

    Raises:
        RequestError: it is neither.
    """
    try:
        if isinstance(value, str) and value.startswith("{"):
            return _to_multiplier(_read_yaml(value, "the multiplier"))
        return _to_multiplier(value)
    except ValueError as error:
        raise RequestError(str(error)) from None


def parse(text: str, where: str, overrides: Sequence[str] = (), flag: str = "--set") -> Config:
    """Read an experiment from YAML text; otherwise as `load`. In errors ``where`` names the text, ``flag`` an override.

    Raises:
        RequestError: something in the text or in an override is wrong.
    """
    return of_document(_read_yaml(text, where), where, overrides, flag)


def of_document(document: object, where: str, overrides: Sequence[str] = (), flag: str = "--set") -> Config:
    """Check an experiment that is already taken apart into mappings and values; otherwise as `parse`."""
    if not isinstance(document, dict):
        found = "is empty" if document is None else f"is {_show(document)}"
        raise RequestError(f"{where} {found}: a config is a mapping with the fields {', '.join(Config.model_fields)}")
    overridden = [_override(document, override, flag) for override in overrides]
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        loc = _by_importance(error)[0]["loc"]
        origin = flag if ".".join(map(str, loc)) in overridden else where
        raise RequestError(f"{origin}: {_explain_first(error, Config)}") from None


def code_named_in(text: str, where: str) -> str | None:
    """The first multiplier in the text of a config (or of a plan) that is code in a file; reads, and runs nothing.

    In errors ``where`` names the text.

    Raises:
        RequestError: the text cannot be read.
    """

    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            value = [*value.keys(), *value.values()]
        if isinstance(value, list):
            for part in value:
                yield from walk(part)
        elif isinstance(value, str):
            yield value
            if value.lstrip().startswith("{"):  # multipliers by layer, as a text
                yield from walk(_read_yaml(value, "a multiplier"))

    return next((found for found in walk(_read_yaml(text, where)) if found.startswith(CODE)), None)


def dump(config: Config) -> str:
    """The complete experiment as YAML; `load` reads the same config from it."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))


def shipped() -> list[str]:
    """Names of the configs that come with the package, in alphabetical order."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def shipped_text(name: str) -> str:
    """The YAML text of a shipped config, its comments included.

    Raises:
        RequestError: no shipped config has that name.
    """
    if name.removesuffix(".yaml") not in shipped():
        raise RequestError(f"config {_show(name)}: {_no_shipped_config(name)}")
    return (_folder() / f"{name.removesuffix('.yaml')}.yaml").read_text(encoding="utf-8")


def shipped_summary(name: str) -> str:
    """What a shipped config is, in one line: the comment that it begins with.

    Raises:
        RequestError: no shipped config has that name.
    """
    return shipped_text(name).partition("\n")[0].removeprefix("#").strip()


def _folder() -> Traversable:
    return resources.files("mbm_cli") / "configs"


def _no_shipped_config(name: str) -> str:
    names = shipped()
    hint = _did_you_mean(os.path.basename(name).removesuffix(".yaml"), names)
    return f"no shipped config has that name ({', '.join(names)}){hint}"


# Reading YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values (`1e-3` is a number, `off` and `2026-01-31` are text), without aliases and tags.

    Aliases are refused because a small file can stand for a huge document with them.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own type)
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refusal("aliases (*name) are not supported: write the value out", event)
        if event.tag is not None:
            raise _refusal("tags (!name) are not supported: write the plain value", event)
        if self._depth == _DEPTH_LIMIT:
            raise _refusal(f"nested more than {_DEPTH_LIMIT} levels deep", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        mapping = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refusal("a key must be a word", key)
            if key.value in mapping:
                raise _refusal(f"{_show(key.value)} is given twice", key)
            mapping[key.value] = self.construct_object(value, deep=deep)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Quotes what this loader or a YAML 1.1 reader would take for something else than text."""


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _refusal(problem: str, at: yaml.Event | yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise RequestError(f"{where} cannot be read as YAML{line}: {_clip(problem, 200)}") from None
    except yaml.reader.ReaderError as error:
        raise RequestError(f"{where} cannot be read as YAML: {error.reason} (character {error.position})") from None
    except (ValueError, OverflowError):  # more digits than Python converts, or an escape beyond Unicode
        raise RequestError(f"{where} cannot be read as YAML: it has a number that is too large") from None


# Overrides


def _override(document: dict[str, Any], override: str, flag: str) -> str:
    """Put one ``section.field=value`` into the document and return ``section.field``."""
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals:
        raise RequestError(f"{flag} {_show(override)}: write section.field=value, for example optimizer.lr=0.002")
    *sections, name = path.split(".")
    parent = ".".join(sections)
    field = _fields(Config).get(path)
    if field is None and parent in _fields(Config) and not _section(_fields(Config)[parent]):
        raise RequestError(f"{flag} {_show(path)}: {parent} has no parts, set it as a whole: {parent}=...")
    if field is None:
        raise RequestError(f"{flag}: {_unknown_field(Config, sections, name)}")
    if model := _section(field):
        example = f"{path}.{next(iter(model.model_fields))}=..."
        raise RequestError(f"{flag} {path}: that is a section, set one of its fields: {example}")
    target = document
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):  # the file is wrong here, and the check of the whole says so
            return path
    target[name] = _read_yaml(text, f"the value of {flag} {path}")
    return path


# Saying what is wrong


@cache
def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Every section and field below a model by its path, in order."""
    fields: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        fields[name] = field
        if section := _section(field):
            fields |= {f"{name}.{path}": inner for path, inner in _fields(section).items()}
    return fields


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _by_importance(error: ValidationError) -> list[Any]:
    """Unknown fields first: a misspelt name is the cause when the right one is missing."""
    return sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")


def _explain_first(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem in one line, and how many more there are."""
    first, *others = _by_importance(error)
    more = f" (and {len(others)} more)" if others else ""
    return _explain(first, model) + more


def _explain(error: dict[str, Any], model: type[BaseModel]) -> str:
    loc = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        return _unknown_field(model, loc[:-1], loc[-1])
    path = ".".join(loc)
    if error["type"] == "value_error":
        return f"{path}: {error['ctx']['error']}"
    field, value = _fields(model)[path], error["input"]
    if error["type"] == "missing":
        return f"{path} is missing: it must be {_allowed(field)}"
    hint = _did_you_mean(value, get_args(field.annotation)) if error["type"] == "literal_error" else ""
    return f"{path} must be {_allowed(field)}, not {_show(value)}{hint}"


def _allowed(field: FieldInfo) -> str:
    if section := _section(field):
        return f"a section with the fields {', '.join(section.model_fields)}"
    return field.description or " | ".join(get_args(field.annotation))


def _unknown_field(model: type[BaseModel], sections: Sequence[str], name: str) -> str:
    """For a wrong name in a right section, and for one in a section that does not exist."""
    fields = _fields(model)
    parent = ".".join(sections)
    known = (_section(fields[parent]) if parent in fields else None) or model
    # The field may be right but in another section (lr, train.lr), or the section misspelt (optimiser.lr).
    path = ".".join([*sections, name])
    own = _nearest(name, known.model_fields) if parent in fields else None
    if own:
        suggestion = [f"{parent}.{own}"]
    else:
        nearest = _nearest(name, {candidate.rpartition(".")[2] for candidate in fields})
        suggestion = [candidate for candidate in fields if candidate.rpartition(".")[2] == nearest]
    hint = _did_you_mean(path, suggestion, cutoff=0)
    inside = f" of {parent}" if parent in fields else ""
    return f"unknown field {_show(path)}: the fields{inside} are {', '.join(known.model_fields)}{hint}"


def _nearest(word: object, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    close = difflib.get_close_matches(str(word)[:100].lower(), choices, n=1, cutoff=cutoff)
    return close[0] if close else None


def _did_you_mean(word: object, choices: Iterable[str], cutoff: float = 0.6) -> str:
    nearest = _nearest(word, choices, cutoff)
    return f"; did you mean {nearest}?" if nearest else ""


def _show(value: object) -> str:
    """A value as one short line: as YAML writes it, text in quotes."""
    return _clip(repr(value) if isinstance(value, str) else json.dumps(value, default=str), 60)


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
