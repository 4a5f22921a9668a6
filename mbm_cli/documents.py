"""YAML documents: reading and writing them, and saying in one line what is wrong with one."""

import json
import re
import reprlib
from functools import cache
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mbm_cli.errors import RequestError, clip, did_you_mean, nearest


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"{show(key.value)} is given twice", problem_mark=key.start_mark)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would read as a number."""


_NUMBER = re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")  # such as 1e-3 and 1.5e3, text to PyYAML
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def read_yaml(text: str, where: str) -> Any:
    """Read a document; errors call it ``where``.

    Raises:
        RequestError: it is not YAML, or a key is given twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise RequestError(f"{where} cannot be read as YAML{line}: {clip(problem, 200)}") from None
    except Exception as error:  # PyYAML's constructors raise errors of many kinds, for example for "!!bool x"
        raise RequestError(f"{where} cannot be read as YAML: {clip(' '.join(str(error).split()), 200)}") from None


def write_yaml(document: object) -> str:
    """Write a document, which `read_yaml` reads back as the same."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))


def explain(error: ValidationError, model: type[BaseModel]) -> tuple[str, str]:
    """Return the path of the first problem, and the problem in one line with the number of others.

    A field's description completes the sentence "<field> must be ..."; choices and sections describe themselves.
    """
    # Unknown fields first: a misspelt name is the cause when the right one is missing.
    first, *others = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    path = ".".join(map(str, first["loc"]))
    return path, _explain(path, first, model) + (f" (and {len(others)} more)" if others else "")


def show(value: object) -> str:
    """Write a value as one short line, text in quotes."""
    if isinstance(value, list | dict):  # reprlib ends where YAML's aliases make a value contain itself
        return clip(reprlib.repr(value), 60)
    return clip(repr(value) if isinstance(value, str) else json.dumps(value, default=str), 60)


def _explain(path: str, error: Any, model: type[BaseModel]) -> str:
    if error["type"] == "extra_forbidden":
        return _unknown_field(path, model)
    if error["type"] == "value_error":
        return f"{path}: {error['ctx']['error']}"
    field, value = fields_of(model).get(path), error["input"]
    if field is None:  # an element of a list or a mapping
        return f"{path}: {error['msg']}"
    choices, section = get_args(field.annotation), _section(field)
    allowed = f"a section with the fields {', '.join(section.model_fields)}" if section else field.description
    allowed = allowed or " | ".join(map(str, choices))
    if error["type"] == "missing":
        return f"{path} is missing: it must be {allowed}"
    hint = did_you_mean(value, choices) if error["type"] == "literal_error" else ""
    return f"{path} must be {allowed}, not {show(value)}{hint}"


def _unknown_field(path: str, model: type[BaseModel]) -> str:
    fields, (parent, _, name) = fields_of(model), path.rpartition(".")
    section = _section(fields[parent]) if parent else model
    known = list(section.model_fields) if section else []
    guess = nearest(name, known)
    hints = [f"{parent}.{guess}" if parent else guess] if guess else []
    if not hints:  # the field may be right but in another section (lr, train.lr)
        guess = nearest(name, {candidate.rpartition(".")[2] for candidate in fields})
        hints = [candidate for candidate in fields if candidate.rpartition(".")[2] == guess]
    hint = did_you_mean(path, hints, cutoff=0)
    return f"unknown field {show(path)}: the fields{f' of {parent}' * bool(parent)} are {', '.join(known)}{hint}"


def field_called(name: str, model: type[BaseModel]) -> str | None:
    """Return the path of the field whose last part has a name, or whose section has it."""
    paths = [path for path, field in fields_of(model).items() if not _section(field)]
    return next((path for path in paths if path.rpartition(".")[2] == name), None) or next(
        (path for path in paths if path == f"{name}.name"), None
    )


@cache
def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return every section and field below a model by its path, in order."""
    fields: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        fields[name] = field
        if section := _section(field):
            fields |= {f"{name}.{path}": inner for path, inner in fields_of(section).items()}
    return fields


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a field that is a section."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
