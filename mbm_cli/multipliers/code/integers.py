"""Users' functions of integers: called for all pairs of operands, in another process, which can crash or hang."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic

import numpy as np

from mbm_cli.multipliers.code.compiler import compile_program, find_compiler, run
from mbm_cli.multipliers.integer import Operands

SECONDS = 30.0  # to compile and to tabulate a function of integers
# They are called a few times each: what they return depends on no machine and no optimiser.
_OPTIONS = "-O1 -fwrapv -ffp-contract=off -w"


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
        command = [*find_compiler("C"), *_OPTIONS.split(), "-iquote", os.path.abspath(includes)]
        compile_program([*command, "-o", program, f"{folder}/main.c", "-lm"], name, SECONDS)
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
        code, _ = run(command, end - monotonic())
    except subprocess.TimeoutExpired:
        raise ValueError(f"{name} does not compute all its products within {SECONDS:.0f} s") from None
    except OSError as error:
        raise ValueError(f"{name} cannot be run in {tempfile.gettempdir()}: {error.strerror}") from None
    if code < 0:
        raise ValueError(f"{name} crashes: {signal.strsignal(-code)}")
    return code
