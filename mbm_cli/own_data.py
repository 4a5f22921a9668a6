"""Data sets of one's own, in files of NumPy's."""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mbm_cli.data_arrays import Shape, splits
from mbm_cli.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mbm_cli.training import Split

_NPZ = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class OwnFile:
    """A data set in an ``.npz`` file: ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``.

    Images are uint8 or float32, (N, H, W) or (N, C, H, W). uint8 is divided by 255 and standardised by the training
    images' mean and standard deviation, channel by channel; float32 is taken as it is.
    """

    path: str

    @property
    def shape(self) -> Shape:
        return _describe_npz(self.path, _version(self.path))[0]

    @property
    def classes(self) -> int:
        return _describe_npz(self.path, _version(self.path))[1]

    @property
    def digest(self) -> str:
        """The SHA-256 of the file."""
        return _sha256(self.path, _version(self.path))

    def fetch(self, root: Path | None = None) -> Path:
        _describe_npz(self.path, _version(self.path))
        return Path(self.path).parent

    def load(
        self,
        device: "torch.device | str",
        root: Path | None = None,
        train_limit: int | None = None,
        test_limit: int | None = None,
    ) -> "tuple[Split, Split]":
        import numpy as np

        self.fetch()
        with _reading_npz(self.path), np.load(self.path, allow_pickle=False) as file:
            train, train_labels, test, test_labels = (file[name] for name in _NPZ)
            for name, images in (("train_images", train), ("test_images", test)):
                if images.dtype.kind == "f" and not np.isfinite(images).all():
                    raise ValueError(f"{name} has values that are not finite")
        train, test = (images[:, None] if images.ndim == 3 else images for images in (train, test))
        arrays = train, train_labels, test, test_labels
        return splits(arrays, self.classes, (), (), device, train_limit, test_limit)


def _version(path: str) -> tuple[int, int]:
    """Return what changes with the content of a file."""
    with _reading_npz(path):
        found = os.stat(path)
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=8)
def _sha256(path: str, version: tuple[int, int]) -> str:
    with _reading_npz(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=8)
def _describe_npz(path: str, version: tuple[int, int]) -> tuple[Shape, int]:
    """Return the shape of an image and the number of classes; check all but the pixels' values.

    Raises:
        RequestError: something is missing or wrong.
    """
    import numpy as np

    with _reading_npz(path), np.load(path, allow_pickle=False) as file:
        if missing := [name for name in _NPZ if name not in file]:
            raise ValueError(f"has no array {', '.join(missing)}: the arrays are {', '.join(_NPZ)}")
        shapes, types, classes = [], [], 0
        for images_name, labels_name in (_NPZ[:2], _NPZ[2:]):
            with file.zip.open(f"{images_name}.npy") as member:
                shape, dtype = _npy_header(member)
            labels = file[labels_name]
            if dtype not in (np.uint8, np.float32) or len(shape) not in (3, 4) or 0 in shape:
                raise ValueError(
                    f"{images_name} is {dtype} {shape}: images are uint8 or float32, (N, H, W) or (N, C, H, W)"
                )
            if labels.dtype.kind not in "iu" or labels.shape != shape[:1] or labels.min() < 0:
                raise ValueError(
                    f"{labels_name} is {labels.dtype} {labels.shape}: labels are integers from 0 on, ({shape[0]},)"
                )
            shapes.append((shape[1] if len(shape) == 4 else 1, shape[-2], shape[-1]))
            types.append(dtype)
            classes = max(classes, int(labels.max()) + 1)
        if shapes[0] != shapes[1] or types[0] != types[1]:
            raise ValueError(f"training images are {types[0]} {shapes[0]}, but test images {types[1]} {shapes[1]}")
        return shapes[0], classes


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], "np.dtype[Any]"]:
    """Return the shape and the type of an array without reading its values."""
    from numpy.lib import format as npy

    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
    shape, _, dtype = read(file)
    return shape, dtype


@contextmanager
def _reading_npz(path: str) -> Iterator[None]:
    """Name the file in what goes wrong while it is read.

    Raises:
        RequestError: it cannot be read, or its content is wrong.
    """
    try:
        yield
    except OSError as error:
        raise RequestError(f"data.dataset: {path} cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise RequestError(f"data.dataset: {path}: {error}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError) as error:
        raise RequestError(f"data.dataset: {path} is damaged ({error})") from None
