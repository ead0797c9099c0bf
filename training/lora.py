"""LoRA on the video stream, through PEFT, beside a caption stream that is trained in full: it is new, and has nothing
to be a small change of.

It knows which weights are trained and how they are given away: as adapters, or merged into a network like any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from univigu import UniViGUTransformer3DModel

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def add_lora(
    transformer: UniViGUTransformer3DModel,
    rank: int,
    alpha: float,
    layers: list[str],
    seed: int,
    also_trained: Callable[[str], bool] = lambda name: False,
) -> None:
    """Adapters on the linear layers whose names end so; everything else stands still but what is `also_trained`."""
    ends = tuple(f".{name}" for name in layers)
    targets = [name for name, part in transformer.named_modules() if isinstance(part, torch.nn.Linear)]
    targets = [name for name in targets if name.endswith(ends)]
    if not targets:
        raise ValueError(f"No layer's name ends in one of {', '.join(layers)}; attention has {', '.join(ATTENTION)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(".lora_" in name or also_trained(name))


def has_lora(transformer: UniViGUTransformer3DModel) -> bool:
    return any(isinstance(part, LoraLayer) for part in transformer.modules())


def save_adapters(transformer: UniViGUTransformer3DModel, folder: Path) -> None:
    """The file of `save_lora_adapter`, which moves the whole network first: one whose weights are shared out over
    processes cannot be moved."""
    settings = {
        k: list(v) if isinstance(v, set) else v for k, v in transformer.peft_config["default"].to_dict().items()
    }
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(get_peft_model_state_dict(transformer), folder / LORA_WEIGHT_NAME_SAFE, metadata)


def merged(transformer: UniViGUTransformer3DModel) -> UniViGUTransformer3DModel:
    """The same function without adapters."""
    state = {name: tensor for name, tensor in transformer.state_dict().items() if ".lora_" not in name}
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}
    for name, part in transformer.named_modules():
        if isinstance(part, LoraLayer):
            for adapter in part.active_adapters:
                weight = state[f"{name}.weight"]
                state[f"{name}.weight"] = weight + part.get_delta_weight(adapter).to(weight)
    with torch.device("meta"):
        plain = UniViGUTransformer3DModel.from_config(transformer.config)
    plain.load_state_dict(state, assign=True)
    for name, buffer in transformer.named_buffers():  # those that are not stored are still on the meta device
        parent, _, last = name.rpartition(".")
        plain.get_submodule(parent).register_buffer(last, buffer.clone(), persistent=False)
    return plain
