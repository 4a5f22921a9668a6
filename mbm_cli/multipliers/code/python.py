"""Users' Python files: functions of floats, which are tabulated, and functions that build networks."""

import hashlib
import runpy
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mbm_cli.errors import first_line
from mbm_cli.multipliers.code import existing
from mbm_cli.multipliers.tables import Table
from mbm_cli.multipliers.tabulate import check_scaling, tabulate

Namespace = dict[str, Any]  # what running a file leaves
DEFAULT_BITS = 7


def read_python(file: str, function: str, bits: int | None, run: dict[Path, Namespace]) -> Table:
    """Run a Python file, unless it is among those that were run, and tabulate its function.

    Raises:
        ValueError: the file or the function is missing or raises, or its results are not a multiplier's products.
    """
    path, bits = existing(file), DEFAULT_BITS if bits is None else bits
    product = _function(path, function, run)
    name = f"{path}:{function}"
    with torch.device("cpu"):  # whatever the caller's default device is
        check_scaling(product, bits, name)
        return tabulate(product, bits, name)


def _function(path: Path, function: str, run: dict[Path, Namespace]) -> Callable[..., Any]:
    """Run a Python file, unless it is among those that were run, and return its function.

    Raises:
        ValueError: the file raises, or has no such function.
    """
    try:
        if path.resolve() not in run:
            run[path.resolve()] = runpy.run_path(str(path))
    except BaseException as error:  # whatever the file does when it is run
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"{_line_of(path, error)} cannot be run: {first_line(error)}") from None
    found: Any = run[path.resolve()].get(function)
    if not callable(found):
        raise ValueError(f"{path} has no function {function}")
    called: Callable[..., Any] = found
    return called


def _line_of(path: Path, error: BaseException | None) -> str:
    """Return a file's path, with the line of it that an error comes from."""
    frames = traceback.extract_tb(error.__traceback__ if error else None)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f"{path}, line {lines[-1]}," if lines else str(path)


@dataclass(frozen=True)
class UsersNetwork:
    """A function of a user's Python file that builds a network: ``function(input_shape, classes) -> nn.Module``.

    Attributes:
        digest: the SHA-256 of the file.
    """

    path: Path
    function: Callable[..., Any]
    digest: str

    def __call__(self, shape: tuple[int, int, int], classes: int) -> torch.nn.Module:
        """Call the function.

        Raises:
            ValueError: it raises, or returns something else.
        """
        try:
            model = self.function(shape, classes)
        except Exception as error:
            raise ValueError(f"{self.where(error)} raises {first_line(error)}") from None
        if not isinstance(model, torch.nn.Module):
            raise ValueError(f"{self.where()} returns {type(model).__name__}, not a torch.nn.Module")
        return model

    def where(self, error: BaseException | None = None) -> str:
        """Return the file and the line that an error comes from, or else that of the function."""
        line = _line_of(self.path, error)
        code = getattr(self.function, "__code__", None)
        return f"{self.path}, line {code.co_firstlineno}," if line == str(self.path) and code else line


def read_network(file: str, function: str, run: dict[Path, Namespace]) -> UsersNetwork:
    """Run a Python file, unless it is among those that were run; return its function that builds a network.

    Raises:
        ValueError: the file or the function is missing, or the file raises.
    """
    path = existing(file)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return UsersNetwork(path, _function(path, function, run), digest)
