"""The ranks of a run, and the few operations between them.

A single process is a world of size 1; every call here is then free. torchrun or Slurm starts
several processes; all of them must make the same calls in the same order.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
import uuid
from collections.abc import Iterable
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ffcv_ssl.errors import UserError

PATIENCE = datetime.timedelta(minutes=20)
"""How long a rank waits for another before it gives up with an error."""


def choose_device(name: str) -> torch.device:
    """A torch device by name; `auto` is the CUDA device where there is one. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"system.device: got {name}, but there is no such device here; use cpu")
    return device


class World:
    """This process' place in the run: its rank of `size`, its local rank, and its device."""

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.device = torch.device(device)

    @classmethod
    def join(
        cls, device_name: str = "auto", num_threads: int = 0, launcher: dict[str, str] | None = None
    ) -> World:
        """Connect to the other ranks, if there are any, as torchrun's environment variables say.

        launcher: dict of the same variables, put into the environment. device_name: auto, cpu, cuda
        or cuda:N; each of several ranks takes the CUDA device of its local rank. num_threads:
        torch's CPU threads; 0: divide the cores among the ranks of the node. Raises UserError for a
        missing device.
        """
        environment = os.environ
        environment.update(launcher or {})
        cores = len(os.sched_getaffinity(0)) // int(environment.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(num_threads or max(1, cores))
        torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
        size = int(environment.get("WORLD_SIZE", 1))
        if size == 1:
            return cls(device=choose_device(device_name))
        rank, local_rank = int(environment["RANK"]), int(environment["LOCAL_RANK"])
        if device_name.startswith("cuda:"):
            raise UserError(f"system.device: got {device_name} for {size} ranks, expected cuda")
        device = choose_device(device_name)
        if device.type == "cuda":
            device = choose_device(f"cuda:{local_rank}")
            torch.cuda.set_device(device)
        # tensors on the host use gloo, so that an agreement between ranks never waits for a device
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = meet(next(dist.rendezvous("env://", timeout=PATIENCE))[0], rank, size)
        dist.init_process_group(backends, timeout=PATIENCE, store=store, rank=rank, world_size=size)
        return cls(rank, size, local_rank, device)

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank, which writes files and prints."""
        return self.rank == 0

    def say(self, text: object, file: TextIO | None = None) -> None:
        """Print a line in the first rank only; on stdout if no file is given."""
        if self.is_first:
            print(text, file=file, flush=True)

    def gather(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """all_gather: the tensors of all ranks (equal shapes), joined along `dim`; gradients flow.

        Every rank must then compute the same loss from it, such as a loss over the global batch.
        Gradients must be averaged over ranks afterwards, as DistributedDataParallel does.
        """
        return tensor if self.size == 1 else _Gather.apply(tensor, self, dim)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place; returns the tensor."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    @torch.no_grad()
    def sum_gradients_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over ranks, in one all_reduce."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        parts = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients)])

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag (bool), whether it is true on any rank."""
        if self.size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return tuple(bool(flag) for flag in raised.tolist())

    def from_first(self, flag: object) -> bool:
        """The first rank's flag (bool), on every rank."""
        return self.any(bool(flag) and self.is_first)[0]

    def broadcast_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite tensors with those of the first rank."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        self.any(False)

    def leave(self) -> None:
        """Disconnect from the other ranks; a second call does nothing."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
            # gloo's threads may still hold tensors of the last calls. A thread that frees a
            # tensor while the interpreter ends can abort the process, which torchrun takes for a
            # crash. So the threads get time to finish.
            time.sleep(0.2)


def meet(store: Any, rank: int, size: int) -> dist.Store:
    """A part of `store` (torch.distributed.Store) that only the ranks of this start write to.

    torchrun keeps one store over all its restarts. The store still holds the addresses of killed
    ranks; gloo would connect to these addresses, and fail or wait for ever. So the first rank
    numbers each start and gives the number to every rank that asks with a token of its own. A dead
    rank's token is never answered.
    """
    if rank == 0:
        start = f"start/{store.add('start', 1)}"
        for other in range(1, size):
            while not store.check([f"{start}/here/{other}"]):
                token = store.get(f"token/{other}").decode()
                store.set(f"answer/{token}", start)
                time.sleep(0.01)
    else:
        token = uuid.uuid4().hex
        store.set(f"token/{rank}", token)
        start = store.get(f"answer/{token}").decode()
        store.set(f"{start}/here/{rank}", "")
    return dist.PrefixStore(start, store)


def share_learning(
    learner: nn.Module, world: World, unreached: bool = False, compiled: bool = False
) -> nn.Module:
    """Wrap the learner: ranks average gradients and, on CUDA, share batch-norm statistics.

    unreached: some parameters may get no gradient in some steps. compiled: use torch.compile.
    """
    if world.size > 1 and world.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(learner)  # in place, as it is no layer itself
    if compiled:
        learner.compile()
    if world.size == 1:
        return learner
    kept_equal = [
        f"{path}.{buffer}"
        for path, module in learner.named_modules()
        for buffer in getattr(module, "equal_on_all_ranks", ())
    ]
    ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(learner, kept_equal)  # otherwise the first rank would broadcast them at each step
    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(learner, devices, find_unused_parameters=unreached)


def average_gradients(
    network: nn.Module, now: bool = True
) -> contextlib.AbstractContextManager[Any]:
    """The context of a backward pass through the module that `share_learning` returned. The ranks
    average gradients at the end of this pass (`now`), or in a later pass."""
    if now or not isinstance(network, DistributedDataParallel):
        return contextlib.nullcontext()
    return network.no_sync()


class _Gather(torch.autograd.Function):
    """all_gather with a gradient that needs no communication. Every rank computes the same loss
    from the same tensors, so a rank needs only its own slice of the gradient. The slice is
    multiplied by the world size, because gradients are averaged over ranks later."""

    @staticmethod
    def forward(ctx, tensor, world, dim):
        ctx.world, ctx.dim, ctx.length = world, dim, tensor.shape[dim]
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(world.size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, gradient):
        mine = gradient.narrow(ctx.dim, ctx.world.rank * ctx.length, ctx.length)
        return mine * ctx.world.size, None, None
