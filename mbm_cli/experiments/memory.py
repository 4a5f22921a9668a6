"""Out of memory: recognised, and answered with a batch that would fit."""

import gc

import torch
import torch.nn.functional as F

from mbm_cli.config import Config
from mbm_cli.models import MODELS


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there was not enough, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def out_of_memory(config: Config, device: torch.device) -> str:
    """What to say: the largest halves of the batch sizes that do fit, tried out."""
    fits = {
        "data.batch_size": _largest(config, device, config.data.batch_size, training=True),
        "data.eval_batch_size": _largest(config, device, config.data.eval_batch_size, training=False),
    }
    asked = {"data.batch_size": config.data.batch_size, "data.eval_batch_size": config.data.eval_batch_size}
    smaller = [f"{field}={fits[field]}" for field in fits if 0 < fits[field] < asked[field]]
    where = "the GPU's memory" if device.type == "cuda" else "memory"
    if not smaller:
        return f"{where} is full, and not by the batch: close what else uses it"
    return f"{where} is too small for this batch, but these would fit: --set {' --set '.join(smaller)}"


def _largest(config: Config, device: torch.device, batch: int, training: bool) -> int:
    """The batch, or half of it, or half of that ...: the first with which a step works; 0 where none does."""
    while batch > 0:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            _try_step(config, device, batch, training)
            return batch
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            batch //= 2
    return 0


def _try_step(config: Config, device: torch.device, batch: int, training: bool) -> None:
    model = MODELS[config.model.name](config.model.multiplier).to(device).train(training)
    with torch.set_grad_enabled(training):
        logits = model(torch.zeros(batch, 1, 28, 28, device=device))
        loss = F.cross_entropy(logits, torch.zeros(batch, dtype=torch.int64, device=device))
        if training:
            loss.backward()
