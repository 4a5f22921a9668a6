"""What users write: multipliers in C and Python, and networks. No other place runs it.

Functions of floats and networks run in this process, functions of integers in another one, which can crash or hang.
"""

import os
from pathlib import Path


def existing(file: str) -> Path:
    """Return a file's path.

    Raises:
        ValueError: there is no such file.
    """
    path = Path(os.path.expanduser(file))  # Path.expanduser and Path.is_file raise for names that no file can have
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    return path
