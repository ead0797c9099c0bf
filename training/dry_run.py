"""What a run would be, before it is one: parameters by part, tokens, memory of a GPU, days; and one tiny real step.

The network is built without memory, and a step of it is taken with tensors that have shapes and no content: what lives
at the same time is counted and not guessed. It knows nothing of data beyond its sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.lora import add_lora
from training.objective import FlowObjective
from training.stages import STAGES, StageRun, is_token_branch
from training.trainer import _recomputed
from univigu import EmbeddingFlowScheduler, MixtureFlowScheduler, UniViGUTransformer3DModel
from univigu.transformer import UMT5_VOCAB_SIZE, WAN_1_3B, WAN_14B
from univigu.weights import WAN_1_3B_REPO

KNOWN = {WAN_1_3B_REPO: WAN_1_3B, "Wan-AI/Wan2.1-T2V-14B-Diffusers": WAN_14B}
UTILISATION = 0.4  # of the GPU's arithmetic that a step is taken to reach
GIB = 1 << 30


@dataclass
class Sizes:
    """One micro-batch in one process."""

    batch: int
    frames: int  # of latents, as height and width
    height: int
    width: int
    caption: int
    prompt: int

    @property
    def video(self) -> int:
        return self.frames * (self.height // 2) * (self.width // 2)

    def shared(self, degree: int) -> Sizes:
        """Of one of so many processes that share its positions: the same work as on a clip so much smaller."""
        if self.video % degree or self.caption % degree:
            raise ValueError(
                f"run.context_parallel={degree} does not divide {self.video} video and {self.caption} caption "
                "positions."
            )
        share = dataclasses.replace(self, caption=self.caption // degree)
        for name, patch in (("width", 2), ("height", 2), ("frames", 1)):
            divisor = math.gcd(getattr(self, name) // patch, degree)
            setattr(share, name, getattr(self, name) // divisor)
            degree //= divisor
        return share


@dataclass
class Memory:
    """Bytes in one process at its fullest moment."""

    weights: int
    gradients: int
    moments: int
    average: int
    gathered: int  # whole weights and gradients, of what is at work, where the weights are shared out
    activations: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


# ---------------------------------------------------------------------------------------------------------- the network


def network_config(config: StageRun) -> dict[str, Any]:
    """The arguments of the network that `config`, a run of the first stage on captions, begins with."""
    folder = Path(config.stage.start)
    if (folder / "transformer/config.json").is_file():
        stored = json.loads((folder / "transformer/config.json").read_text())
        known = {
            k: v for k, v in stored.items() if k in UniViGUTransformer3DModel._get_init_keys(UniViGUTransformer3DModel)
        }
        vocabulary = json.loads((folder / "text_encoder/config.json").read_text())["vocab_size"]
    elif config.stage.start in KNOWN:
        known, vocabulary = KNOWN[config.stage.start], UMT5_VOCAB_SIZE
    else:
        raise ValueError(
            f"stage.start={config.stage.start!r} is no pipeline folder here and none of {', '.join(KNOWN)}, so its "
            "size is not known."
        )
    if config.stage.name == "recall":
        known = {**known, "vocab_size": vocabulary, **config.model.tokens}
        if config.model.caption_flow == "mixture":
            known = {"token_state": "ids", "normalize_token_embedding": False, **known}
    return known


def build_network(arguments: dict[str, Any], config: StageRun) -> UniViGUTransformer3DModel:
    """The network as the stage trains it, wherever torch now makes tensors."""
    network = UniViGUTransformer3DModel(**arguments)
    if config.stage.trained == "token_branch":
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(is_token_branch(name))
    elif config.stage.trained == "lora":
        stage = config.stage
        add_lora(network, stage.lora_rank, stage.lora_alpha, stage.lora_layers, 0, also_trained=is_token_branch)
    return network


def parameters_by_part(network: torch.nn.Module) -> dict[str, int]:
    """How many parameters each part has, those of all blocks together."""
    parts: dict[str, int] = {}
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            part = "LoRA"
        elif name.startswith("blocks."):
            inside = name.split(".")[2]
            part = {
                "attn1": "attention over video and caption",
                "attn2": "attention to the prompt",
                "ffn": "video expert",
                "token_ffn": "caption expert",
            }.get(inside, "norms and modulation")
        elif name.startswith("token_embedding."):
            part = "caption embedding E"
        elif name.startswith("token_proj_out."):
            part = "caption head"
        elif name.startswith("token_"):
            part = "caption time"
        else:
            part = "video in and out, time, prompt"
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


# --------------------------------------------------------------------------------------------------------------- memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what a step makes, gradients apart, as long as it is alive."""

    def __init__(self, network: UniViGUTransformer3DModel) -> None:
        super().__init__()
        self.now = self.gradients = self.peak = self.late_peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
        trained = [p for p in network.parameters() if p.requires_grad]
        # late: when the first block is at work and all other gradients are there
        self.late = sum(p.nbytes for p in trained) - sum(p.nbytes for p in network.blocks[0].parameters())
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._gradient)
        self.references: dict[int, weakref.ref] = {}

    def _gradient(self, parameter: torch.Tensor) -> None:
        """A gradient is whole: it counts elsewhere from now on."""
        self.gradients += parameter.nbytes
        key = parameter.grad.untyped_storage()._cdata
        if self.references.pop(key, None) is not None:
            self.now -= parameter.grad.untyped_storage().nbytes()
            self.known.add(key)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known and key not in self.references:
            size = storage.nbytes()
            self.references[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)
            if self.gradients >= self.late:
                self.late_peak = max(self.late_peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        if self.references.pop(key, None) is not None:
            self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return result


def estimate_memory(arguments: dict[str, Any], config: StageRun, sizes: Sizes, processes: int, gpu: bool) -> Memory:
    """The fullest moment of a step, with attention as it is computed on a GPU or on a CPU.

    Two moments can be the fullest: when the forward pass ends, with what all blocks keep, and when the backward pass
    ends, with all gradients. Every block keeps the same, so of many only a few are looked at.
    """
    with torch.device("meta"):
        network = build_network(arguments, config)
    sizes, layers = sizes.shared(config.run.context_parallel), len(network.blocks)
    early, late = _passes(arguments, config, sizes, min(layers, 5), gpu)
    if layers > 5:
        early += (early - _passes(arguments, config, sizes, 3, gpu)[0]) // 2 * (layers - 5)
    trained = [p for p in network.parameters() if p.requires_grad]
    weights, gradients = sum(p.nbytes for p in network.parameters()), sum(p.nbytes for p in trained)
    per_weight = {"adamw": 2.0, "adamw8bit": 0.5, "muon": 1.0}[config.optim.name]
    # What the optimiser makes on the way: on a GPU it takes all weights at once, on a CPU one by one; the average
    # always takes all at once, when the gradients are gone.
    share = processes if config.run.fsdp else 1
    step = gradients // share if gpu else max(p.nbytes for p in trained)
    gathered = 0
    if share > 1:
        blocks = [sum(p.nbytes for p in block.parameters()) for block in network.blocks]
        apart = network.token_proj_out.weight.nbytes
        rest = weights - sum(blocks) - apart
        # two blocks (one is fetched ahead) and a gradient, or the caption head and its, and all the rest twice
        gathered = max(3 * max(blocks), 2 * apart) + 2 * rest
    # with the gradients in place, what else is there: late in the passes, in the step, or instead of them
    activations = max(early - gradients // share, late, step)
    return Memory(
        weights // share,
        gradients // share,
        int(gradients * per_weight) // share,
        gradients // share,
        gathered,
        activations,
    )


def _passes(arguments: dict[str, Any], config: StageRun, sizes: Sizes, layers: int, gpu: bool) -> tuple[int, int]:
    """The most that the passes of so many layers make beside gradients: in all, and when these are there."""
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.run.mixed_precision)
    # autocast as the trainer has it
    cast = contextlib.nullcontext()
    if precision:
        cast = torch.autocast("cpu", precision, cache_enabled=not config.run.fsdp)
    attention = (
        sdpa_kernel(SDPBackend.MATH) if precision and not gpu else contextlib.nullcontext()
    )  # as the objective's
    with torch.device("meta"):  # where PEFT can add its layers
        network = build_network({**arguments, "num_layers": layers}, config)
    with FakeTensorMode(), torch.random.fork_rng(devices=[]), cast, attention:
        for part in network.modules():
            for name, tensor in part._parameters.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    part._parameters[name] = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
            for name, tensor in part._buffers.items():
                part._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        if config.run.checkpointing:
            network.enable_gradient_checkpointing(_recomputed)
        with LiveBytes(network) as live:
            _shape_only_step(network, config, sizes)
    return live.peak, live.late_peak


def _shape_only_step(network: UniViGUTransformer3DModel, config: StageRun, sizes: Sizes) -> None:
    """The joint pass, which is the largest, and its backward."""
    latents = torch.randn(sizes.batch, network.config.in_channels, sizes.frames, sizes.height, sizes.width)
    ids = torch.zeros(sizes.batch, sizes.caption, dtype=torch.long)
    prompts = torch.randn(sizes.batch, sizes.prompt, network.config.text_dim)
    objective, tau = _objective(network, config, prompts[0]), torch.rand(sizes.batch)
    state, aim = objective._noised(ids, tau, None)
    inputs = (latents, 1000 * tau, prompts, state, 1000 * tau)
    velocity, hidden = network(*inputs, project_tokens=False, return_dict=False)
    text = objective._text_loss(hidden, tau, state, ids, aim, config.objective.text_loss)
    (F.mse_loss(velocity.float(), latents) + text).backward()


def _objective(network: UniViGUTransformer3DModel, config: StageRun, empty_prompt: torch.Tensor) -> FlowObjective:
    if network.config.token_state == "ids":
        flow = MixtureFlowScheduler(network.config.vocab_size, **config.model.token_flow)
    else:
        prediction = "logits" if network.config.token_head == "logits" else "clean"
        flow = EmbeddingFlowScheduler(**{"prediction_type": prediction, **config.model.token_flow})
    target = STAGES[config.stage.name].target
    return FlowObjective(network, config.objective, target, config.model.video_shift, flow, empty_prompt=empty_prompt)


# ----------------------------------------------------------------------------------------------------------------- time


def step_flops(network: UniViGUTransformer3DModel, sizes: Sizes, checkpointing: bool) -> float:
    """Arithmetic of one micro-batch, forward and backward, in matrix products."""
    config = network.config
    dim = config.num_attention_heads * config.attention_head_dim
    video, caption, prompt = sizes.video, sizes.caption, sizes.prompt
    positions = video + caption
    token_width = config.token_ffn_dim or config.ffn_dim
    block = (
        2 * positions * 6 * dim**2 + 2 * prompt * 2 * dim**2
    )  # four products of one attention, two and two of the other
    block += 4 * dim * (video * config.ffn_dim + caption * token_width)
    block += 4 * dim * positions * (positions + prompt)
    width = config.vocab_size if config.token_head == "logits" else (config.token_dim or dim)
    ends = 2 * caption * dim * width + 4 * video * dim * config.in_channels * 4
    if config.token_head != "logits":
        ends += 2 * caption * width * config.vocab_size
    passes = 4 if checkpointing else 3  # backward is two, and one more to compute again
    return float(sizes.batch * (passes * config.num_layers * block + 3 * ends))


# ----------------------------------------------------------------------------------------------------------- the report


def sizes_of(config: StageRun) -> Sizes:
    """The largest micro-batch that the data's sizes allow. Latents are a quarter in time and an eighth in space."""
    data, pipeline = config.data, config.model.pipeline
    caption = pipeline.get("max_caption_tokens", 256)
    best = None
    for frames, height, width in data["sizes"]:
        sizes = Sizes(
            1, (frames - 1) // 4 + 1, height // 8, width // 8, caption, pipeline.get("max_prompt_tokens", 512)
        )
        sizes.batch = max(1, data["tokens_per_batch"] // (sizes.video + caption))
        if best is None or sizes.batch * sizes.video > best.batch * best.video:
            best = sizes
    return best


def dry_run(config: StageRun, first: StageRun, gpus: int, tflops: float) -> None:
    """Print what the run would take, and take one step of a network of the same kind that is tiny.

    `first` is the first stage's configuration, which says what the second one's network is before it is there.
    """
    if config.data.get("kind") != "clips":
        raise ValueError("--dry-run reads the sizes of clips: data.kind must be clips.")
    arguments, sizes, context = network_config(first), sizes_of(config), config.run.context_parallel
    if gpus % context:
        raise ValueError(f"run.context_parallel={context} does not divide --gpus {gpus}.")
    with torch.device("meta"):
        network = build_network(arguments, config)
    total = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    for part, count in parameters_by_part(network).items():
        print(f"{count / 1e6:10.1f} M  {part}")
    print(f"{total / 1e6:10.1f} M  parameters, of which {trained / 1e6:.1f} M are trained")
    print(
        f"a micro-batch: {sizes.batch} clips of {sizes.video} video and {sizes.caption} caption tokens; a step: "
        f"{sizes.batch * config.optim.accumulate * gpus // context} clips"
        + (f"; {context} GPUs share the positions of each" if context > 1 else "")
    )
    memory = estimate_memory(arguments, config, sizes, gpus, gpu=True)
    for name, size in vars(memory).items():
        print(f"{size / GIB:10.1f} GiB  {name}")
    print(f"{memory.total / GIB:10.1f} GiB  on each of {gpus} GPUs, estimated")
    flops = step_flops(network, sizes, config.run.checkpointing) * config.optim.accumulate / context
    seconds = flops / (tflops * 1e12 * UTILISATION)
    print(
        f"{seconds:.1f} s a step and {seconds * config.run.steps / 86400:.1f} days for {config.run.steps} steps, at "
        f"{UTILISATION:.0%} of {tflops:g} TFLOP/s"
    )
    print(f"one tiny step: loss {tiny_step(config, arguments):.3f}")


def tiny_step(config: StageRun, arguments: dict[str, Any]) -> float:
    """One step with every setting of the run but its size; what cannot work together fails here."""
    small = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "num_layers": 1, "text_dim": 16}
    small |= {"freq_dim": 32, "vocab_size": 96}
    small |= {k: min(arguments[k], 16) for k in ("token_dim", "token_ffn_dim") if arguments.get(k)}
    torch.manual_seed(config.run.seed)
    network = build_network({**arguments, **small}, config)
    objective = _objective(network, config, torch.zeros(4, 16))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective.to(device)
    if config.run.checkpointing:
        network.enable_gradient_checkpointing(_recomputed)
    ids = torch.randint(96, (4, 8), device=device)
    batch = {
        "latents": torch.randn(4, network.config.in_channels, 2, 4, 4, device=device),
        "caption_ids": ids,
        "prompt_ids": ids,
        "prompt_embeds": torch.randn(4, 4, 16, device=device),
        "position": torch.arange(4, device=device),
    }
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.run.mixed_precision)
    with torch.autocast(device.type, precision) if precision else contextlib.nullcontext():
        loss, _ = objective(batch, torch.Generator(device).manual_seed(0))
    loss.backward()
    if not math.isfinite(loss.item()):
        raise ValueError(f"One tiny step gives a loss of {loss.item()}.")
    return loss.item()
