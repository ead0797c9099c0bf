"""DeepSpeed's ZeRO stage 2 under the trainer: gradients and moments are shared out over the processes, weights are not.

DeepSpeed keeps each process's share of the moments in one long tensor. Here they become a tensor for every weight and
back, so that its checkpoints are those of `sharded.py`, and no file of a run is unpickled. It knows nothing of steps,
batches or losses; the package itself is imported only by who asks for it.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin

from training.config import OptimConfig, RunConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def zero_plugin(run: RunConfig, optim: OptimConfig) -> DeepSpeedPlugin:
    """What accelerate has to know. Raises ValueError where DeepSpeed is missing or cannot do what is asked for."""
    config = zero_config(run, optim)
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"run.deepspeed={run.deepspeed} needs the package deepspeed: pip install deepspeed.")
    return DeepSpeedPlugin(hf_ds_config=config)


def zero_config(run: RunConfig, optim: OptimConfig) -> dict[str, Any]:
    if run.fsdp or run.context_parallel > 1 or optim.name != "adamw" or run.mixed_precision == "fp16":
        raise ValueError(
            "run.deepspeed takes optim.name=adamw and run.mixed_precision bf16 or no, in the place of run.fsdp and "
            "run.context_parallel."
        )
    if optim.prompt_encoder_lr is not None:
        raise ValueError("run.deepspeed takes one learning rate for all: leave optim.prompt_encoder_lr out.")
    config = {
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own accounts; batches are the trainer's
        "gradient_accumulation_steps": 1,  # the trainer says when a step is whole
        "gradient_clipping": optim.grad_clip,
        "zero_optimization": {"stage": run.deepspeed},
    }
    if run.mixed_precision == "bf16":  # weights stay in float32, as without DeepSpeed
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


def read_moments(engine: Any, parameters: list[torch.nn.Parameter]) -> SimpleNamespace:
    """Something with the state of an optimiser whose moments are whole. All processes must call it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    state = defaultdict(dict)
    flat = engine.optimizer.single_partition_of_fp32_groups[0]
    for parameter in parameters:
        state[parameter] = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
        state[parameter]["step"] = engine.optimizer.optimizer.state[flat]["step"].clone()
    return SimpleNamespace(state=state)


def write_moments(engine: Any, state: dict[torch.nn.Parameter, dict[str, torch.Tensor]]) -> None:
    """The reverse; the weights that DeepSpeed steps are taken anew from the network too."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    optimizer = engine.optimizer
    steps = next(iter(state.values()))["step"]
    for flat in optimizer.single_partition_of_fp32_groups:
        moments = {name: torch.zeros_like(flat) for name in MOMENTS}
        optimizer.optimizer.state[flat] = {"step": steps.clone(), **moments}
    optimizer._lazy_init_hp_params_optimizer_state()
    for parameter, moments in state.items():
        safe_set_full_fp32_param(parameter, parameter.detach())
        for name in MOMENTS:
            safe_set_full_optimizer_state(parameter, moments[name], name)
