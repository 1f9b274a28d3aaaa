"""One fit in several processes: which of them does what, a base divided among them (FSDP), samples shared without one counted twice."""

from __future__ import annotations

import os
from collections.abc import Iterator

PROCESSES, FSDP = "TSUGIKI_PROCESSES", "TSUGIKI_FSDP"  # what `accelerate launch` asked for


def is_first_process() -> bool:
    """Whether this process does the work, of those that ``accelerate launch`` or ``torchrun`` have started.

    The recipe runs once, in the first of them; each of its fits starts as many processes as there were. The others end
    at once. What the launcher left in the environment is taken out of it, so that nothing else waits for them.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        return False
    if "WORLD_SIZE" not in os.environ:
        return True
    os.environ[PROCESSES] = os.environ["WORLD_SIZE"]
    os.environ[FSDP] = str(int(os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"))
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_")) or name in (
            "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
        ):
            del os.environ[name]
    return True


def process_count() -> int:
    """Processes of this fit (``WORLD_SIZE``, which torchrun, accelerate and :mod:`tsugiki.adapt.launch` set)."""
    return int(os.environ.get("WORLD_SIZE", 1))


def shard(model, device: str) -> None:
    """Divide a model's parameters among the processes (fully sharded, ZeRO-3): each decoder layer is whole only while it runs.

    Args:
        model: a PEFT model, the same in every process; an NF4 base's 4-bit values must be stored as bf16.
        device: ``cuda`` or ``cpu``.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from tsugiki.adapt.nll import model_parts

    mesh = init_device_mesh(device, (process_count(),))
    for layer in model_parts(model)[0].layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def adapter_state(model) -> dict:
    """The adapter's tensors, whole, in main memory; where the model is divided, every process must call this."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().cpu()
        for name, p in model.named_parameters() if p.requires_grad
    }


def agreed(value: bool) -> bool:
    """What the first process says, in all of them: clocks differ, and a checkpoint is written by all or by none."""
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    said = torch.tensor([int(value)], device=device)
    distributed.broadcast(said, 0)
    return bool(said.item())


class WholeBatches:
    """A sampler for several processes: the order that one process draws, then a blank row until all have equal batches.

    By itself accelerate repeats the first samples there, which would count twice.

    Args:
        samples: how many there are; the blank row has this index.
        total: how many indices an epoch yields.
        seed: of the order.
    """

    def __init__(self, samples: int, total: int, seed: int) -> None:
        from accelerate.data_loader import SeedableRandomSampler

        self.order = SeedableRandomSampler(range(samples), data_seed=seed)
        self.samples, self.total = samples, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        yield from self.order
        yield from [self.samples] * (self.total - self.samples)

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)
