"""The configs that come with the package."""

import os
from importlib import resources
from pathlib import Path

from mbm_cli.documents import show
from mbm_cli.errors import RequestError, did_you_mean


def shipped() -> dict[str, str]:
    """Return the configs that come with the package as YAML texts, by name; the first line says what each is."""
    files = sorted((resources.files("mbm_cli") / "configs").iterdir(), key=lambda file: file.name)
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in files if f.name.endswith(".yaml")}


def shipped_text(name: str) -> str:
    """Return the YAML text of a shipped config, with or without ``.yaml`` in its name.

    Raises:
        RequestError: no shipped config has that name.
    """
    texts, stem = shipped(), name.removesuffix(".yaml")
    if stem not in texts:
        hint = did_you_mean(os.path.basename(stem), texts)
        raise RequestError(f"config {show(name)}: no such file or shipped config ({', '.join(texts)}){hint}")
    return texts[stem]


def copy_shipped(name: str, path: Path) -> None:
    """Copy a shipped config to a new file, whole or not at all.

    Raises:
        RequestError: there is no such config, or the file exists or cannot be written.
    """
    text = shipped_text(name)
    try:
        with path.open("x", encoding="utf-8") as file:
            try:
                file.write(text)
                file.flush()
            except OSError:
                path.unlink()
                raise
    except FileExistsError:
        raise RequestError(f"{path} exists already: name another file") from None
    except OSError as error:
        raise RequestError(f"cannot write {path} ({error.strerror}): name another file") from None
