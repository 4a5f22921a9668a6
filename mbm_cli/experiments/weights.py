"""Weights of a network, from a checkpoint or a plain ``state_dict``."""

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from mbm_cli.errors import RequestError

FILE = "init.pt"  # in the folder of a run that starts from them


def initial(path: str, model: nn.Module) -> tuple[bytes, dict[str, str]]:
    """Read the weights that a training starts from; return them as a file's content, and the file's path and SHA-256.

    Raises:
        RequestError: as `read`.
    """
    state, digest = read(path, model, "train.init")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue(), {"path": path, "sha256": digest}


def read(path: str, model: nn.Module, field: str) -> tuple[dict[str, Tensor], str]:
    """Read weights that fit a model, from a ``.safetensors`` file or one that ``torch.load`` reads.

    Args:
        field: names the file in errors.

    Returns:
        The ``state_dict``, and the SHA-256 of the file.

    Raises:
        RequestError: the file cannot be read, holds more than tensors, or does not fit, layer by layer.
    """
    try:
        content = Path(path).read_bytes()
        if path.endswith(".safetensors"):
            found = safetensors.torch.load(content)
        else:
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except OSError as error:
        raise RequestError(f"{field}: {path} cannot be read ({error.strerror})") from None
    except pickle.UnpicklingError:
        raise RequestError(
            f"{field}: {path} is damaged, or holds more than tensors: write torch.save(model.state_dict(), FILE)"
        ) from None
    except Exception as error:  # a damaged or foreign archive raises errors of many kinds
        first = (str(error).splitlines() or [""])[0]
        raise RequestError(f"{field}: {path} is damaged ({type(error).__name__}: {first[:120]})") from None
    state = found.get("model", found) if isinstance(found, dict) else found
    _refuse_others(state, model, f"{field}: {path}")
    return dict(state), hashlib.sha256(content).hexdigest()


def _refuse_others(state: Any, model: nn.Module, where: str) -> None:
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RequestError(f"{where} holds neither a checkpoint nor a state_dict of tensors")
    wanted = {name: value for name, value in model.state_dict().items() if not is_scale(name)}
    state = {name: value for name, value in state.items() if not is_scale(name)}
    faults = [f"{name} is missing" for name in wanted if name not in state]
    faults += [f"{name} is unknown to the network" for name in state if name not in wanted]
    faults += [
        f"{name} has shape {list(state[name].shape)}, not {list(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if faults:
        more = f" (and {len(faults) - 8} more)" if len(faults) > 8 else ""
        raise RequestError(f"{where} does not fit the network: {'; '.join(faults[:8])}{more}")


def is_scale(name: str) -> bool:
    """Return whether an entry of a ``state_dict`` belongs to a quantizer: such entries may be missing."""
    return ".quantizer." in name


def load_into(model: nn.Module, folder: Path) -> None:
    """Load the weights that a run's folder keeps, if it has some."""
    if (folder / FILE).exists():
        load_state(model, torch.load(folder / FILE, map_location="cpu", weights_only=True))


def load_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Load a ``state_dict`` with those scales of quantised layers that the model has a use for.

    Raises:
        RuntimeError: it does not fit.
    """
    wanted = model.state_dict()
    found = model.load_state_dict({n: x for n, x in state.items() if n in wanted or not is_scale(n)}, strict=False)
    wrong = [name for name in (*found.missing_keys, *found.unexpected_keys) if not is_scale(name)]
    if wrong:
        raise RuntimeError(f"{wrong[0]} is missing, or not the model's")
