"""Users' functions of floats in C: compiled, for the kernels and by themselves."""

import ctypes
import hashlib
import os
import platform
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs
import torch
from torch import Tensor

from mbm_cli.errors import RunError
from mbm_cli.multipliers.code import existing
from mbm_cli.multipliers.code.compiler import compile_program, cpu_flags, find_compiler
from mbm_cli.multipliers.tables import Table
from mbm_cli.multipliers.tabulate import Product, check_scaling, tabulate

C_SIZE_LIMIT = 1 << 20
# As in CMakeLists.txt, which explains them. Without contraction, a function rounds as it is written.
_COMPILER_OPTIONS = (
    "-std=c++17 -O3 -fno-trapping-math -fno-math-errno -ffp-contract=off -fPIC -shared -fvisibility=hidden"
)
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
    command = [*find_compiler(), *_COMPILER_OPTIONS.split(), *native, *macros]
    text = "#include <cstdint>\n" + function.renamed('#include "function.h"') + main
    content = [function.digest, *command, cpu_flags(), text, *headers.values()]
    digest = hashlib.sha256("\0".join(content).encode()).hexdigest()[:32]
    library = platformdirs.user_cache_path("mbm") / "functions" / f"{digest}.so"
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                for name, header in {**headers, "function.h": function.text, "main.cpp": text}.items():
                    Path(folder, name).write_text(header, encoding="utf-8")
                compile_program([*command, "-o", f"{folder}/main.so", f"{folder}/main.cpp"], function.name)
                os.replace(f"{folder}/main.so", library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise RunError(
            f"{library.parent}, where compiled functions are kept, cannot be used ({error}): name another cache folder "
            "in XDG_CACHE_HOME"
        ) from error


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
    check_scaling(product, bits, name)
    return tabulate(product, bits, name)
