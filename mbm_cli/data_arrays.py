"""Arrays of data sets: read from files in published formats, and put on a device."""

import gzip
import io
import pickle
import zipfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mbm_cli.training import Split

Shape = tuple[int, int, int]  # of an image: channels, height, width
# Images and labels of the training set, then of the test set: (N, C, H, W) and (N,), as files have them.
Arrays = tuple["np.ndarray", "np.ndarray", "np.ndarray", "np.ndarray"]


def read_idx(files: Sequence[bytes]) -> Arrays:
    """Read MNIST's format: training images and labels, test images and labels, each plain or gzip."""
    train, train_labels, test, test_labels = map(_idx_array, files)
    return train[:, None], train_labels, test[:, None], test_labels


def _idx_array(content: bytes) -> "np.ndarray":
    import numpy as np

    # The IDX format: 2 zeros, the type, the number of dimensions, each dimension in 4 bytes, the values.
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    sizes = np.frombuffer(content, ">u4", content[3], 4)
    kind = np.dtype({0x08: "u1", 0x0C: ">i4"}[content[2]])
    values = np.frombuffer(content, kind, offset=4 + 4 * len(sizes)).reshape(sizes)
    return values[:, 0] if values.ndim == 2 else values  # of QMNIST's labels the first of eight numbers is the class


def read_emnist(split: str, files: Sequence[bytes]) -> Arrays:
    """Read one split of EMNIST's archive; its images are stored by columns."""
    parts = [f"{part}-{kind}" for part in ("train", "test") for kind in ("images-idx3", "labels-idx1")]
    with zipfile.ZipFile(io.BytesIO(files[0])) as archive:
        read = read_idx([archive.read(f"gzip/emnist-{split}-{part}-ubyte.gz") for part in parts])
    first = 1 if split == "letters" else 0  # letters count from 1
    return read[0].swapaxes(2, 3), read[1] - first, read[2].swapaxes(2, 3), read[3] - first


def read_cifar(labels: str, files: Sequence[bytes]) -> Arrays:
    """Read CIFAR's pickled batches, of which the last one is the test set. Their checksums have been verified."""
    import numpy as np

    batches = [pickle.loads(content, encoding="latin1") for content in files]
    images = [np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32) for batch in batches]
    numbers = [np.asarray(batch[labels]) for batch in batches]
    return np.concatenate(images[:-1]), np.concatenate(numbers[:-1]), images[-1], numbers[-1]


def splits(
    arrays: Arrays,
    classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: "torch.device | str",
    train_limit: int | None,
    test_limit: int | None,
) -> "tuple[Split, Split]":
    """Put both sets on a device, pixels in uint8 standardised: without figures, by those of the training images."""
    import numpy as np
    import torch

    from mbm_cli.training import Split

    train, train_labels, test, test_labels = arrays
    if not mean and train.dtype == np.uint8:
        mean, std = _statistics(train)

    def put(images: "np.ndarray", labels: "np.ndarray", limit: int | None) -> Split:
        pixels = torch.from_numpy(np.require(images[:limit], requirements=["C", "W"])).to(device).float()
        black = torch.zeros(pixels.shape[1], 1, 1, device=device)
        if mean:
            pixels.div_(255)
        for part in (pixels, black[None]) if mean else ():
            # A scalar for each channel: a GPU divides by a tensor with other last bits.
            for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
                part[:, channel].sub_(m).div_(s)
        return Split(pixels, torch.from_numpy(labels[:limit].astype(np.int64)).to(device), classes, black)

    return put(train, train_labels, train_limit), put(test, test_labels, test_limit)


def _statistics(images: "np.ndarray") -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 images, scaled to 0..1; 1 for a constant one."""
    import numpy as np

    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = np.bincount(images[:, channel].ravel(), minlength=256)
        mean = float(counts @ values / counts.sum())
        means.append(mean)
        deviations.append(float(np.sqrt(counts @ (values - mean) ** 2 / counts.sum())) or 1.0)
    return tuple(means), tuple(deviations)
