"""Weights, optimiser and average over any number of processes: cut by torch's FSDP2, written and read as safetensors;
and long clips over several processes, by diffusers' context-parallel plan.

A checkpoint holds whole tensors in pieces that know their place, so any number of processes reads what any other number
wrote, each only what it needs, and no file is unpickled. Frozen weights are not in it: they are where the run began. It
knows nothing of steps, batches or losses.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from diffusers.hooks import apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig, ContextParallelOutput, ParallelConfig
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

LARGE = 1 << 27  # elements of a layer that is gathered by itself


def shard(module: nn.Module, device: torch.device, large: int = LARGE) -> None:
    """FSDP2: every process keeps its share of each weight, and a block's weights are gathered when it is at work.

    The blocks are those that a model itself names as not to be split. Weights are gathered in float32, so that what
    must not be rounded is not; autocast rounds where it may.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    names = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    for part in reversed(list(module.modules())):  # what is inside first
        # the caption head's 256,384 rows are gathered for their product alone, and not for the whole step
        if type(part).__name__ in names or (isinstance(part, nn.Linear) and part.weight.numel() > large):
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)


def share_context(module: nn.Module, device: torch.device, degree: int) -> None:
    """Context parallel: `degree` neighbouring processes hold the same examples, and each of them a share of the
    positions between the first layer and the last. Attention exchanges shares of positions for shares of heads.

    Every process ends with the whole output and the same loss, and the mean of their gradients is the gradient.
    Call this before `shard`.
    """
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    if world % degree:
        raise ValueError(f"run.context_parallel={degree} does not divide the number of processes, {world}.")
    mesh = init_device_mesh(device.type, (world // degree, 1, degree), mesh_dim_names=("data", "ring", "ulysses"))
    for network in module.modules():
        if getattr(network, "_cp_plan", None) is None:
            continue
        heads = network.config.num_attention_heads
        if heads % degree:
            raise ValueError(f"run.context_parallel={degree} does not divide the network's {heads} heads.")
        # What `enable_parallelism` does, which asks for an accelerator and so cannot be had on CPUs.
        config = ContextParallelConfig(ulysses_degree=degree, mesh=mesh)
        parallel = ParallelConfig(context_parallel_config=config)
        parallel.setup(rank, world, device, mesh=mesh)
        for part in network.modules():
            if hasattr(getattr(part, "processor", None), "_parallel_config"):
                part.processor._parallel_config = parallel
        plan = {name: what for name, what in network._cp_plan.items() if hasattr(network, name)}
        apply_context_parallel(network, config, plan)
        for name, what in plan.items():
            part = network.get_submodule(name)
            if isinstance(what, ContextParallelOutput):
                part.register_forward_hook(_with_the_others(degree))
            elif name.endswith("_embedding"):
                part.register_forward_pre_hook(_divided_by(degree))


def _with_the_others(degree: int):
    """Before the gathering a process has that part of each gradient which its share of the positions makes. The parts
    are to be added up, and as processes take the mean, each part is given `degree` times."""

    def hook(part: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * degree)

    return hook


def _divided_by(degree: int):
    def hook(part: nn.Module, inputs: tuple) -> None:
        shape = inputs[0].shape
        is_video = isinstance(part, nn.Conv3d)
        positions = math.prod(shape[2:]) // math.prod(part.stride) if is_video else shape[1]
        if positions % degree:
            kind = "a clip" if is_video else "a caption"
            raise ValueError(f"run.context_parallel={degree} does not divide the {positions} positions of {kind}.")

    return hook


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's share of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def whole_weights(module: nn.Module, here: bool) -> Iterator[None]:
    """While this lasts, `module` holds whole weights on the CPU in the process that is `here`, to be exported. All
    processes must enter."""
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):
                    full = parameter.detach().full_tensor()
                    if here:
                        kept.append((part, name, parameter))
                        part._parameters[name] = nn.Parameter(full.cpu(), requires_grad=parameter.requires_grad)
        yield
    finally:
        for part, name, parameter in kept:
            part._parameters[name] = parameter


# -------------------------------------------------------------------------------------------------------- checkpoints


def save_state(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: list[torch.Tensor]) -> None:
    state = {name: _storable(tensor) for name, tensor in _state(module, optimizer, average).items()}
    with _plainly():
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(state, storage_writer=writer, no_dist=not torch.distributed.is_initialized())


def load_state(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: list[torch.Tensor]) -> None:
    """Raises ValueError where the checkpoint is of other weights."""
    reader = HuggingFaceStorageReader(str(folder))
    there = {name: stored.size for name, stored in reader.read_metadata().state_dict_metadata.items()}
    _prepare(optimizer, module, there)
    state = _state(module, optimizer, average)
    for name, tensor in state.items():
        if name not in there:
            raise ValueError(f"it lacks {name}")
        if tensor.ndim and there[name] != tensor.shape:
            raise ValueError(f"{name} is {tuple(there[name])} there and {tuple(tensor.shape)} here")
    unknown = [name for name in there if name not in state]
    if unknown:
        raise ValueError(f"{unknown[0]} has no place here")
    storable = {name: _storable(tensor) for name, tensor in state.items()}
    with _plainly():
        dcp.load(storable, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    with torch.no_grad():
        for name, tensor in state.items():
            local(tensor).copy_(local(storable[name]).reshape(local(tensor).shape))


@contextmanager
def _plainly() -> Iterator[None]:
    """Without the remark that one process is one, and with the reason of a failure instead of a class of its own."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise OSError(" ".join(str(reason).split())) from None


def _state(module: nn.Module, optimizer: torch.optim.Optimizer, average: list[torch.Tensor]) -> dict[str, Any]:
    """Every tensor of a run under a name of its own; those of sharded weights as shards of the whole."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    parameters = dict(module.named_parameters(remove_duplicate=False))  # tied weights have several names
    state = {f"model.{name}": parameter.detach() for name, parameter in trained.items()}
    state |= {f"model.{name}": tensor for name, tensor in module.state_dict().items() if name not in parameters}
    for name, parameter in trained.items():
        state |= {f"optimizer.{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    for (name, parameter), tensor in zip(trained.items(), average, strict=True):
        state[f"average.{name}"] = _like(parameter, tensor)
    return state


def _like(parameter: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return share
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(share, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def _prepare(optimizer: torch.optim.Optimizer, module: nn.Module, there: dict[str, torch.Size]) -> None:
    """Make room for the optimiser's state, which it would only make in its first step."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    for stored, size in there.items():
        kind, key, name = (*stored.split(".", 2), "", "")[:3]
        if kind == "optimizer" and name in trained:
            parameter = trained[name]
            same = size == parameter.shape
            optimizer.state[parameter][key] = torch.zeros_like(parameter) if same else torch.zeros(())


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    """Safetensors keeps no memory layout, and its reader no tensors without a dimension."""
    tensor = tensor.detach()
    return tensor.reshape(1) if tensor.ndim == 0 else tensor.contiguous()
