"""Functions that users write: in Python, tabulated, and in C, compiled. The only module that runs users' code.

Functions of floats run in this process, those of integers in another one, which can crash or hang.
"""

import ctypes
import hashlib
import os
import platform
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import platformdirs
import torch
from torch import Tensor

from mbm_cli.errors import MbmError, RunError
from mbm_cli.multipliers.integer import Operands
from mbm_cli.multipliers.tables import Table

Product = Callable[[Tensor, Tensor], Tensor]
Namespace = dict[str, Any]  # what running a file leaves

DEFAULT_BITS = 7
MOST_BITS = 11
PAIRS = 4096  # operands of a check
SECONDS = 30.0  # to compile and to tabulate a function of integers
C_SIZE_LIMIT = 1 << 20
_COMPILE_SECONDS = 300.0
# As in CMakeLists.txt, which explains them. Without contraction, a function rounds as it is written.
_COMPILER_OPTIONS = (
    "-std=c++17 -O3 -fno-trapping-math -fno-math-errno -ffp-contract=off -fPIC -shared -fvisibility=hidden"
)
# Of functions of integers, which are called a few times each: what they return depends on no machine and no optimiser.
_INTEGER_OPTIONS = "-O1 -fwrapv -ffp-contract=off -w"
_BITS_TYPES = ("uint32_t", "unsigned", "unsigned int")
_QUALIFIERS = ("static", "inline", "__inline", "__inline__", "const", "extern", "volatile", "register")
_SIGNATURES = "write uint32_t f(uint32_t a, uint32_t b), on bit patterns of float32, or float f(float a, float b)"


@dataclass(frozen=True)
class Function:
    """A function in C: ``float f(float, float)``, or ``uint32_t f(uint32_t, uint32_t)`` on bit patterns of float32.

    Raises:
        ValueError: the text does not define the function, or with another signature.
    """

    name: str
    text: str = field(repr=False)
    digest: str = field(init=False)

    # The kernels call it by this name: its own could be one of theirs (mbm, product).
    CALLED = "mbm_users_function"

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", hashlib.sha256(f"{self.name}\n{self.text}".encode()).hexdigest())
        self._takes_floats()  # which reads the signature

    def _takes_floats(self) -> bool:
        text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", self.text, flags=re.DOTALL)
        match = re.search(rf"([A-Za-z_][\w \t*]*?[\s*])\s*{self.name}\s*\(([^()]*)\)\s*\{{", text)
        if match is None:
            raise ValueError(f"there is no definition of a function {self.name}: {_SIGNATURES}")
        result, parameters = (
            plain_type(match[1]),
            [plain_type(one.rsplit(None, 1)[0]) for one in match[2].split(",") if one.strip()],
        )
        if [result, *parameters] == ["float"] * 3:
            return True
        if len(parameters) == 2 and all(one in _BITS_TYPES for one in (result, *parameters)):
            return False
        raise ValueError(f"{self.name} is {result} {self.name}({', '.join(parameters)}): {_SIGNATURES}")

    def renamed(self, text: str) -> str:
        """Return C text that holds the function, with the function renamed to what the kernels call."""
        if not self._takes_floats():
            return f"#define {self.name} {self.CALLED}\n{text}\n#undef {self.name}\n"
        floats = f"{self.CALLED}_of_floats"
        return f"""#define {self.name} {floats}
{text}
#undef {self.name}
static inline uint32_t {self.CALLED}(uint32_t a, uint32_t b) {{
  union {{ uint32_t bits; float number; }} x = {{a}}, y = {{b}}, product;
  product.number = {floats}(x.number, y.number);
  return product.bits;
}}
"""

    def define(self, exchanged: bool = False) -> str:
        """Return the macro by which the kernels call the function, with its operands exchanged if asked for."""
        return f"#define MBM_FUNCTION(a, b) ::{self.CALLED}({'b, a' if exchanged else 'a, b'})\n"

    @property
    def handle(self) -> str:
        """The function as an operator's argument: all that is needed to compile it."""
        return f"c:{self.name}\n{self.text}"

    @classmethod
    def of_handle(cls, handle: str) -> "Function":
        name, _, text = handle.removeprefix("c:").partition("\n")
        return cls(name, text)


def plain_type(text: str) -> str:
    """Return a C type without qualifiers."""
    return " ".join(word for word in text.replace("*", " * ").split() if word not in _QUALIFIERS)


def read_c(file: str, function: str) -> Function:
    """Read a function in C; the backends compile it.

    Raises:
        ValueError: the file is missing, or does not define the function.
    """
    path = existing(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if len(text) > C_SIZE_LIMIT:
        raise ValueError(f"{path} is larger than {C_SIZE_LIMIT >> 20} MiB, too large for a multiplier")
    if re.search(r'^\s*#\s*include\s*"', text, re.MULTILINE):
        # Compiled functions are cached by the content of this file.
        raise ValueError(f'{path} includes another file: replace #include "..." by that file\'s content')
    try:
        return Function(function, text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def compile_library(function: Function, main: str, headers: Mapping[str, str], macros: list[str]) -> ctypes.CDLL:
    """Compile C++ that calls a user's function, once, into the user's cache folder; load it.

    Args:
        main: the text after the function, which can include the headers.
        headers: texts by file name.

    Raises:
        ValueError: there is no compiler, or it rejects the function; the message has its first error.
        RunError: the cache cannot be used.
    """
    native = ["-march=native"] if platform.machine() in ("x86_64", "AMD64") else []
    command = [*_compiler(), *_COMPILER_OPTIONS.split(), *native, *macros]
    text = "#include <cstdint>\n" + function.renamed('#include "function.h"') + main
    content = [function.digest, *command, _cpu_flags(), text, *headers.values()]
    digest = hashlib.sha256("\0".join(content).encode()).hexdigest()[:32]
    library = platformdirs.user_cache_path("mbm") / "functions" / f"{digest}.so"
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                for name, header in {**headers, "function.h": function.text, "main.cpp": text}.items():
                    Path(folder, name).write_text(header, encoding="utf-8")
                _compile([*command, "-o", f"{folder}/main.so", f"{folder}/main.cpp"], function.name)
                os.replace(f"{folder}/main.so", library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise RunError(
            f"{library.parent}, where compiled functions are kept, cannot be used ({error}): name another cache folder "
            "in XDG_CACHE_HOME"
        ) from error


def _compile(command: list[str], name: str, seconds: float = _COMPILE_SECONDS) -> None:
    try:
        code, output = _run(command, seconds, stderr=subprocess.PIPE)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{name} does not compile within {seconds:.0f} s") from None
    if code:
        raise ValueError(f"{name} does not compile: {first_compiler_error(output)}")


def _run(command: list[str], seconds: float, stderr: int = subprocess.DEVNULL) -> tuple[int, str]:
    """Run a command; return its exit code and, from a pipe, its errors. What it started ends with it at the limit.

    Raises:
        subprocess.TimeoutExpired: it takes longer.
    """
    null = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=null, stdout=null, stderr=stderr, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=max(seconds, 0))
        except BaseException:  # an interrupt, too: a session of its own gets none from the terminal
            with suppress(ProcessLookupError, PermissionError):  # it may have ended just now
                os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, errors or ""


def first_compiler_error(output: str) -> str:
    """Return the first error of a C or C++ compiler's or NVRTC's output, with the line of the user's file."""
    if missing := re.search(r"undefined reference to .*", output):
        return missing[0]
    lines = [line for line in output.splitlines() if "error" in line] or [output.strip() or "no reason given"]
    users = re.search(r"function\.h[:(](\d+)[^e]*(?:fatal )?error:? *(.*)", lines[0])
    return f"line {users[1]}: {users[2]}" if users else lines[0]


def _compiler(language: str = "C++") -> list[str]:
    """Find the system's compiler: that in CXX or CC, else the one that built Python, else the usual names."""
    variable, names = {"C++": ("CXX", ("c++", "g++", "clang++")), "C": ("CC", ("cc", "gcc", "clang"))}[language]
    named = [os.environ.get(variable), sysconfig.get_config_var(variable), *names]
    for command in (shlex.split(name) for name in named if name):
        if shutil.which(command[0]):
            return command
    raise ValueError(
        f"a multiplier in C needs a {language} compiler on the CPU: install one ({' or '.join(names[1:])}), or name it "
        f"in {variable}"
    )


@lru_cache(maxsize=1)
def _cpu_flags() -> str:
    """Return what -march=native stands for here: other machines may share the cache's disk."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line for line in text.splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def product_of(function: Function) -> Product:
    """Compile a function in C for the CPU; return it as a product of float32 tensors.

    Raises:
        ValueError, RunError: as `compile_library`.
    """
    loop = f"""extern "C" __attribute__((visibility("default")))
void mbm_products(const uint32_t* a, const uint32_t* b, uint32_t* out, int64_t count) {{
  for (int64_t i = 0; i < count; i++) out[i] = {function.CALLED}(a[i], b[i]);
}}
"""
    library = compile_library(function, loop, {}, [])

    def product(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        out = torch.empty_like(a)
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, out))
        library.mbm_products(*pointers, ctypes.c_int64(a.numel()))
        return out

    return product


def tabulate_c(function: Function, bits: int, name: str) -> Table:
    """Tabulate a function in C, through the compiled one.

    Raises:
        ValueError: as `tabulate`, or its signs and exponents do not behave as in a multiplication.
    """
    product = product_of(function)
    _check_scaling(product, bits, name)
    return tabulate(product, bits, name)


def read_python(file: str, function: str, bits: int | None, run: dict[Path, Namespace]) -> Table:
    """Run a Python file, unless it is among those that were run, and tabulate its function.

    Raises:
        ValueError: the file or the function is missing or raises, or its results are not a multiplier's products.
    """
    path, bits = existing(file), DEFAULT_BITS if bits is None else bits
    product = _function(path, function, run)
    name = f"{path}:{function}"
    with torch.device("cpu"):  # whatever the caller's default device is
        _check_scaling(product, bits, name)
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


def existing(file: str) -> Path:
    """Return a file's path.

    Raises:
        ValueError: there is no such file.
    """
    path = Path(os.path.expanduser(file))  # Path.expanduser and Path.is_file raise for names that no file can have
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    return path


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


def _check_scaling(product: Product, bits: int, name: str) -> None:
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


def first_line(error: BaseException) -> str:
    """Write an error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# Functions of integers


def integers_of_c(text: str, includes: Path, call: str, operands: Operands, name: str) -> np.ndarray:
    """Compile a function of integers, as C, and call it for all pairs of operands, in another process.

    Args:
        text: the file that defines it.
        includes: the folder of what it includes in quotes.
        call: the call, an expression of the bit patterns ``mbm_a`` and ``mbm_b``, which are of type int.
        name: of the function, for errors.

    Returns:
        int64 (2^n, 2^n), by the operands' bit patterns; unsigned 64-bit results wrap.

    Raises:
        ValueError: there is no compiler, it rejects the file, or the function crashes, exits or takes too long.
    """
    size, end = 1 << operands.bits, monotonic() + SECONDS
    main = f"""#include <stdint.h>
#include <stdio.h>
#define main mbm_users_main
#include "function.h"
#undef main
int main(int mbm_count, char** mbm_arguments) {{
  FILE* mbm_file = mbm_count > 1 ? fopen(mbm_arguments[1], "wb") : NULL;
  if (!mbm_file) return 1;
  for (int mbm_a = 0; mbm_a < {size}; mbm_a++)
    for (int mbm_b = 0; mbm_b < {size}; mbm_b++) {{
      int64_t mbm_product = (int64_t){call};
      if (fwrite(&mbm_product, sizeof mbm_product, 1, mbm_file) != 1) return 1;
    }}
  return fclose(mbm_file);
}}
"""
    with tempfile.TemporaryDirectory() as folder:
        for file, content in {"function.h": text, "main.c": main}.items():
            Path(folder, file).write_text(content, encoding="utf-8")
        program, products = f"{folder}/main", Path(folder, "products")
        command = [*_compiler("C"), *_INTEGER_OPTIONS.split(), "-iquote", os.path.abspath(includes)]
        _compile([*command, "-o", program, f"{folder}/main.c", "-lm"], name, SECONDS)
        code = _run_users([program, str(products)], end, name)
        if code or not products.exists() or products.stat().st_size != 8 * size**2:
            raise ValueError(f"{name} ends its process (exit code {code}) before all products are computed")
        return np.fromfile(products, np.int64).reshape(size, size)


# What `integers_of_python` runs: it reads the operands, and writes the products, and what went wrong if anything.
_CALL = """
import runpy, sys
import numpy as np

file, function, folder = sys.argv[1:]

def problem():
    try:
        product = runpy.run_path(file).get(function)
    except BaseException as error:
        return " cannot be run: " + first_line(error)
    if not callable(product):
        return " has no function " + function
    a, b = np.load(folder + "/operands.npy")
    shape = a.shape
    try:
        products = np.asarray(product(a, b))
    except BaseException as error:
        return ":" + function + " raises " + first_line(error)
    if products.dtype.kind not in "iu" or products.shape != shape:
        return f":{function} returns {products.dtype} {products.shape} for two int64 {shape}, not their products"
    np.save(folder + "/products.npy", products)
    return ""

def first_line(error):
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

found = problem()
with open(folder + "/problem", "w", encoding="utf-8") as out:
    out.write(found)
"""


def integers_of_python(path: Path, function: str, operands: Operands) -> np.ndarray:
    """Run a Python file and call its function once, for arrays of all pairs of operands, in another process.

    Returns:
        Integers of the function's type, (2^n, 2^n), by the operands' bit patterns.

    Raises:
        ValueError: the file or the function is missing, raises, crashes or takes too long, or returns something else.
    """
    numbers, end = operands.numbers(), monotonic() + SECONDS
    with tempfile.TemporaryDirectory() as folder:
        pairs = np.stack([np.repeat(numbers, len(numbers)), np.tile(numbers, len(numbers))])
        np.save(f"{folder}/operands.npy", pairs)
        # -P: not with modules of the current folder, which could hide Python's.
        code = _run_users([sys.executable, "-P", "-c", _CALL, str(path), function, folder], end, f"{path}:{function}")
        problem = Path(folder, "problem")
        if not problem.exists():
            raise ValueError(f"{path}:{function} ends its process (exit code {code}) before all products are computed")
        if what := problem.read_text(encoding="utf-8"):
            raise ValueError(f"{path}{what}")
        products: np.ndarray = np.load(f"{folder}/products.npy", allow_pickle=False)
        return products.reshape(len(numbers), -1)


def _run_users(command: list[str], end: float, name: str) -> int:
    """Run users' code; return its exit code.

    Raises:
        ValueError: it takes too long, or crashes.
    """
    try:
        code, _ = _run(command, end - monotonic())
    except subprocess.TimeoutExpired:
        raise ValueError(f"{name} does not compute all its products within {SECONDS:.0f} s") from None
    except OSError as error:
        raise ValueError(f"{name} cannot be run in {tempfile.gettempdir()}: {error.strerror}") from None
    if code < 0:
        raise ValueError(f"{name} crashes: {signal.strsignal(-code)}")
    return code
