"""Reads a run's YAML file into typed dataclasses, with dotted overrides such as `optim.lr=1e-4`.

Every key is known: a wrong one is refused with the nearest right one. It knows how to check keys and types, and nothing
of what the settings mean.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

SECTIONS = ("recall", "refine")  # a file for both stages keeps what differs under their names
CONFIG_FOLDER = Path(__file__).parent / "configs"
Config = TypeVar("Config")


@dataclass
class OptimConfig:
    name: Literal["adamw", "muon", "adamw8bit"] = "adamw"  # adamw8bit keeps its moments in 8 bits (bitsandbytes)
    lr: float = 2e-4
    matrix_lr: float = 2e-3  # of weight matrices under muon
    # Of a prompt encoder that learns on, under Adam whatever the network is under; without it, as the network's. Muon's
    # steps at 5e-3 moved each of its matrices by more than its length, and it forgot words that come up seldom.
    prompt_encoder_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)  # section 4.1
    weight_decay: float = 0.0  # section 4.1 says Adam
    warmup_steps: int = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    final_lr_share: float = 0.05  # where the cosine ends, as a share of lr
    grad_clip: float = 1.0
    accumulate: int = 1  # micro-batches per step in each process


@dataclass
class RunConfig:
    folder: str = ""
    steps: int = 1000
    batch_size: int = 16  # of one micro-batch in one process
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    fsdp: bool = False  # of several processes, each keeps its share of the weights only (FSDP2)
    deepspeed: Literal[0, 2] = 0  # 2: DeepSpeed's ZeRO stage 2, in place of fsdp
    context_parallel: int = 1  # so many neighbouring processes share the positions of each clip between them
    checkpointing: bool = False  # recompute each block in the backward pass instead of keeping what it computed
    compile: bool = False  # the blocks, through torch.compile
    onednn: bool = False  # matrix products in float32 on a CPU by oneDNN, not MKL: for AMD's processors with AVX-512
    ema_decay: float = 0.999
    workers: int = 1  # processes that prepare batches; 0 prepares them in the training process
    log_every: int = 10
    save_every: int = 500
    keep: int = 2  # checkpoints
    validate_every: int = 500
    trackers: list[str] = field(default_factory=list)  # tensorboard, trackio, wandb; the JSONL log is always written


def load_config(kind: type[Config], source: str | Path, overrides: list[str], section: str = "") -> Config:
    """The settings of `source`, a YAML file or the name of one in training/configs, after the overrides.

    Of a file with `SECTIONS`, what is under `section` comes over what all share."""
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = CONFIG_FOLDER / f"{source}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in CONFIG_FOLDER.glob("*.yaml")))
        raise ValueError(f"There is no configuration {str(source)!r}: give a YAML file or one of {names}.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a mapping of settings, not {type(settings).__name__}.")
    sections = {name: settings.pop(name) for name in SECTIONS if name in settings}
    if sections:
        settings = _over(settings, sections.get(section) or {})
    for override in overrides:
        dotted, separator, text = override.partition("=")
        if not separator:
            raise ValueError(f"The override {override!r} must look like optim.lr=1e-4.")
        *parents, last = dotted.split(".")
        target = settings
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"The override {override!r} goes below {parent!r}, which is a single value.")
        try:
            target[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"The value of the override {override!r} is not valid YAML.") from None
    return build_config(kind, settings)


def build_config(kind: type[Config], settings: dict[str, Any], where: str = "") -> Config:
    """Fill the dataclass `kind` from nested mappings, refusing unknown keys and wrong types."""
    hints = typing.get_type_hints(kind)
    for key in settings:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)[0]
            raise ValueError(f"There is no setting {where}{key}; the nearest is {where}{near}.")
    required = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in settings
    ]
    if required:
        raise ValueError(f"The setting {where}{required[0]} is missing and has no default.")
    return kind(**{key: _convert(value, hints[key], f"{where}{key}") for key, value in settings.items()})


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain lists, numbers and mappings, as YAML and JSON hold them."""
    return {
        key: list(value) if isinstance(value, tuple) else config_to_dict(value) if isinstance(value, dict) else value
        for key, value in (dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config).items()
    }


def _over(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    nested = {k: _over(settings[k], v) for k, v in changes.items() if isinstance(v, dict) and k in settings}
    return {**settings, **changes, **nested}


def _convert(value: Any, hint: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must hold settings of its own, not {value!r}.")
        return build_config(hint, value, f"{name}.")
    if origin is Literal:
        if value is False and "no" in arguments:  # what YAML reads a bare no as
            value = "no"
        if value not in arguments:
            raise ValueError(f"{name} must be one of {', '.join(map(str, arguments))}, not {value!r}.")
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, next(a for a in arguments if a is not type(None)), name)
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list, not {value!r}.")
        kinds = [arguments[0]] * len(value) if origin is list or arguments[-1] is Ellipsis else arguments
        if len(value) != len(kinds):
            raise ValueError(f"{name} must have {len(kinds)} entries, not {len(value)}.")
        return origin(_convert(v, k, f"{name}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a mapping, not {value!r}.")
        return value
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4, without a dot, as text
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{name} must be a number, not {value!r}.") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is not Any and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ValueError(f"{name} must be {hint.__name__}, not {value!r}.")
    return value
