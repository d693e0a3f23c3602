"""The ranks of a run, and the few operations between them.

A single process is a world of size 1; every call here is then free. torchrun or Slurm starts
several processes; all of them must make the same calls in the same order.
"""

from __future__ import annotations

import datetime
import functools
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed as dist
from torch import nn

from ffcv_ssl.config.stdout import say_if_possible
from ffcv_ssl.cores import usable_cores
from ffcv_ssl.errors import ToldBefore, UserError
from ffcv_ssl.training import lost_ranks, meeting
from ffcv_ssl.training.console import Console

PATIENCE_MINUTES = 20.0
"""How long a rank waits for another before it gives up with an error, if nothing else is said."""


def choose_device(name: str) -> torch.device:
    """A torch device by name; `auto` is the CUDA device where there is one. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"system.device: got {name}, but there is no such device here; use cpu")
    return device


def choose_rank_device(local_rank: int, local_size: int) -> torch.device:
    """The CUDA device of one of `local_size` ranks on this machine. Raises UserError.

    A launcher may show each rank its own device alone (Slurm's --gpus-per-task): it is then cuda:0.
    """
    number = torch.cuda.device_count()
    if 1 < number < local_size:
        got = f"got {local_size} ranks on a machine with {number} CUDA devices"
        raise UserError(f"system.device: {got}; start one rank per device")
    return choose_device(f"cuda:{local_rank if number > 1 else 0}")


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor of the host on a device; on CUDA by way of page-locked memory, so that the host does
    not wait for the device."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class _Seat(NamedTuple):
    """Where a rank runs: host, identity of its device ("" on CPUs), and the cores it may use."""

    host: str
    device: str
    cores: frozenset[int]


class World:
    """This process' place in the run: its rank of `size`, its local rank, and its device.

    cores: this rank's share of the cores of its machine. console: shows what takes a while.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        device: str | torch.device = "cpu",
        cores: int | None = None,
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.device = torch.device(device)
        self.cores = len(usable_cores()) if cores is None else cores
        self.console = Console()  # console.showing replaces it while a command runs

    @classmethod
    def join(
        cls,
        device_name: str = "auto",
        num_threads: int = 0,
        launcher: dict[str, str] | None = None,
        tf32: bool = True,
        shared: bool = False,
        patience_minutes: float = PATIENCE_MINUTES,
    ) -> World:
        """Connect to the other ranks, if there are any, as torchrun's environment variables say.

        launcher: dict of the same variables, put into the environment. device_name: auto, cpu, cuda
        or cuda:N; each of several ranks takes a CUDA device of its own. num_threads: torch's CPU
        threads; 0: the rank's share of the cores. tf32: float32 convolutions on CUDA use TF32.
        shared: all ranks take one CUDA device, and their tensors meet on the host.
        patience_minutes: how long a rank waits for another.
        Raises UserError for a missing device, ToldBefore if an earlier start has failed by a
        mistake of the user, and LostRank if a rank does not come.
        """
        environment = os.environ
        environment.update(launcher or {})
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, tf32
        size = int(environment.get("WORLD_SIZE", 1))
        if size == 1:
            world = cls(device=choose_device(device_name))
            torch.set_num_threads(num_threads or world.cores)
            return world
        rank, local_rank = int(environment["RANK"]), int(environment["LOCAL_RANK"])
        if device_name.startswith("cuda:") and not shared:
            raise UserError(f"system.device: got {device_name} for {size} ranks, expected cuda")
        device = choose_device(device_name)
        if device.type == "cuda":
            local_size = int(environment.get("LOCAL_WORLD_SIZE", 1))
            one = torch.device("cuda", device.index or 0)
            device = one if shared else choose_rank_device(local_rank, local_size)
            torch.cuda.set_device(device)
        # tensors on the host use gloo, so that an agreement between ranks never waits for a device;
        # NCCL refuses two ranks on one device
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" and not shared else "gloo"
        patience = datetime.timedelta(minutes=patience_minutes)
        _stores["launch"] = meeting.reach_launcher(patience)
        if _stores["launch"].check([_MISTAKE]):
            raise ToldBefore
        patience_s = patience.total_seconds()
        store = _stores["start"] = meeting.meet(_stores["launch"], rank, size, patience_s)
        _stores["explain"] = functools.partial(
            lost_ranks.explain, store=store, rank=rank, size=size, patience_s=patience_s
        )
        dist.init_process_group(backends, timeout=patience, store=store, rank=rank, world_size=size)
        world = cls(rank, size, local_rank, device, _share_of_cores(device, shared))
        torch.set_num_threads(num_threads or world.cores)
        return world

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank, which writes files and prints."""
        return self.rank == 0

    @functools.cached_property
    def gathers_into_tensor(self) -> bool:
        """Whether the ranks' tensors can be gathered into one; gloo only knows lists of them."""
        if not is_connected():
            return False
        group: Any = dist.group.WORLD
        return group._get_backend(self.device).name() == "nccl"

    def say(self, text: object, file: TextIO | None = None) -> None:
        """Print a line in the first rank only; on stdout if no file is given."""
        if self.is_first and file is None:
            say_if_possible(str(text))
        elif self.is_first:
            print(text, file=file, flush=True)

    def gather(self, tensor: torch.Tensor, dim: int = 0, partial: bool = False) -> torch.Tensor:
        """all_gather: the tensors of all ranks (equal shapes), joined along `dim`; gradients flow.

        Every rank must then compute the same from it, such as the loss of the global batch;
        partial: each rank may compute its own part of the loss from it, and the parts are joined
        with `mean`. Gradients must be averaged over ranks afterwards, as DistributedDataParallel
        does.
        """
        return tensor if self.size == 1 else _Gather.apply(tensor, self, dim, partial)

    def mean(self, tensor: torch.Tensor, partial: bool = False) -> torch.Tensor:
        """The mean over ranks of tensors of equal shapes; gradients flow. partial: as in
        `gather`."""
        return tensor if self.size == 1 else _Mean.apply(tensor, self, partial)

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

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Leave the other ranks, but not after an error. It may be this rank's alone, and the
        others may wait for this rank in a collective; leaving would wait for them, for NCCL up to
        the patience. `command.run_ranks` then ends the process."""
        if error is None:
            self.leave()

    def leave(self) -> None:
        """Disconnect from the other ranks; a second call does nothing."""
        if self.size > 1 and dist.is_initialized():
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                # when a first rank ends with 75, torchrun tells the others to stop, who end anyhow
                # and have a summary to print
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            dist.destroy_process_group()
            _stores["explain"] = lambda error: None
            # gloo's threads may still hold tensors of the last calls. A thread that frees a
            # tensor while the interpreter ends can abort the process, which torchrun takes for a
            # crash. So the threads get time to finish.
            time.sleep(0.2)


_stores: dict[str, Any] = {}
"""Of this process' connection: "launch", which torchrun keeps over restarts, "start", and "explain"
for an error of a call between ranks, from the meeting to the end."""
_MISTAKE = "mistake"


def is_connected() -> bool:
    """Whether this process is connected to other ranks, who may be waiting for it."""
    return dist.is_available() and dist.is_initialized()


def was_connected() -> bool:
    """Whether this process has been connected to other ranks."""
    return "explain" in _stores


def explain_loss(error: BaseException) -> str | None:
    """The line that names the ranks that this one waited for in vain; None for other errors."""
    return _stores["explain"](error) if was_connected() else None


def tell_first(line: str, is_mistake: bool) -> bool:
    """Whether this rank is the first of all ranks to report `line`.

    is_mistake: a mistake of the user, which will not go away: if torchrun starts the ranks again,
    their `World.join` raises ToldBefore.
    """

    def tell() -> bool:
        if is_mistake:
            _stores["launch"].set(_MISTAKE, line)
        return _stores["start"].add(f"told/{line}", 1) == 1

    told = lost_ranks.answer_of(tell) if "start" in _stores else None
    return told is None or told  # without an answer, better twice than never


def tell_before_meeting(line: str, is_mistake: bool) -> bool:
    """Whether this rank is to report `line` before the ranks have met. Under torchrun every rank
    finds a mistake of the user, at each restart: the first of all reports it. is_mistake: as in
    `tell_first`.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            store = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=20)))[0]
            if is_mistake:
                store.set(_MISTAKE, line)
            return store.add(f"told/{line}", 1) == 1
        except (RuntimeError, ValueError):  # torchrun has ended, or its variables are incomplete
            pass
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _share_of_cores(device: torch.device, shared: bool = False) -> int:
    """This rank's share of the cores of its machine, at least 1. All ranks call it. Raises
    UserError where two ranks have one CUDA device, unless it is `shared`.

    Ranks may be free to use all cores of the machine or be bound to cores of their own (Slurm,
    torchrun --numa-binding): a core counts in equal parts for the ranks that may use it.
    """
    identity = ""
    if device.type == "cuda" and not shared:
        identity = str(torch.cuda.get_device_properties(device).uuid)
    seat = _Seat(socket.gethostname(), identity, usable_cores())
    seats: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seats, seat)
    if identity and sum(other[:2] == seat[:2] for other in seats) > 1:
        got = f"got several ranks on one CUDA device of {seat.host}"
        raise UserError(f"system.device: {got}; start one rank per device, or use cpu")
    users = Counter(core for other in seats if other.host == seat.host for core in other.cores)
    return max(1, int(sum(1 / users[core] for core in seat.cores) + 1e-9))


ALONE = World()
"""The world of a single process on a CPU, for losses that are called without ranks."""


# Gradients of what ranks exchange. Each rank has the gradient of its own loss, and gradients are
# averaged over ranks later, so what a tensor needs here is the sum of all ranks' gradients. Where
# every rank has computed the same from the same tensors, that sum is the own gradient times the
# number of ranks, and needs no communication.


def _over_ranks(gradient, world, partial):
    return world.sum_(gradient.contiguous().clone()) if partial else gradient * world.size


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, world, dim, partial):
        ctx.world, ctx.dim, ctx.length, ctx.partial = world, dim, tensor.shape[dim], partial
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(world.size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, gradient):
        gradient = _over_ranks(gradient, ctx.world, ctx.partial)
        start = ctx.world.rank * ctx.length
        return gradient.narrow(ctx.dim, start, ctx.length), None, None, None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, world, partial):
        ctx.world, ctx.partial = world, partial
        return world.sum_(tensor.contiguous().clone()) / world.size

    @staticmethod
    def backward(ctx, gradient):
        return _over_ranks(gradient / ctx.world.size, ctx.world, ctx.partial), None, None
