"""Which model, and where its weights come from.

A name, a folder, a file or a Hub id becomes a `UniViGUPipeline`: one of ours as it is, a Wan2.1 text-to-video pipeline
as the start of one (`load_wan`), or the authors' released checkpoint (`load_released`). What was imported is saved in
our own format with `save_pretrained`. Nothing here unpickles code, and nothing here knows of sampling or clips.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from univigu.pipeline import UniViGUPipeline
from univigu.token_flow import EmbeddingFlowScheduler, MixtureFlowScheduler, caption_shift
from univigu.transformer import UniViGUTransformer3DModel

WAN_1_3B_REPO = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
WAN_14B_REPO = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
RELEASED_REPO = "Fr0zencr4nE/Uni-ViGU"
EMBEDDED = "toybox"
NAMES = {
    EMBEDDED: str(Path(__file__).resolve().parent.parent / "assets" / "toybox"),
    "wan2.1-1.3b": WAN_1_3B_REPO,
    "wan2.1-14b": WAN_14B_REPO,
    "released": RELEASED_REPO,
}
WHAT_A_MODEL_CAN_BE = (
    f"give {', '.join(NAMES)}, a folder with a Uni-ViGU or Wan2.1 pipeline, a released checkpoint (.pth or "
    f".safetensors), or a Hub id such as {WAN_1_3B_REPO}"
)

WAN_SHIFT_480P = 3.0  # Wan's time shift for the video at 480p; 5 at 720p
CAPTION_ENTROPY = 3.0  # nats that a caption's word still has in its context; places an untrained caption flow's shift

# What the released model expects of its inputs, where it differs from Wan's own pipeline.
RELEASED_SETTINGS = {
    "zero_prompt_padding": False,
    "empty_prompt": "zeros",
    "normalize_latents": False,
    "prompt_as_tokens": True,
    "blind_video": False,  # its video has always seen the tokens
}

# What the released checkpoint's names begin with, and ours for the same. Going back, the first that fits counts too.
RELEASED_PREFIXES = {
    "cond_text_embedder.": "condition_embedder.text_embedder.",
    "time_embedding_v.": "condition_embedder.",
    "time_embedding_t.": "token_time_embedding.",
    "video_head.proj_out.": "proj_out.",
    "text_head.norm_final.": "token_norm_out.",
    "text_head.linear.": "token_proj_out.",
    "scale_shift_table_v": "scale_shift_table",
    "scale_shift_table_t": "token_scale_shift_table",
    "vocab_embed.": "token_embedding.table.",
}
TOKEN_FREQUENCIES = "rotary_emb_text.inv_freq"
WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_orig_mod\.")


@dataclass(frozen=True)
class FoundModel:
    """`kind`: "univigu" (a pipeline of ours), "wan" or "released". `location`: a folder, a file or a Hub id."""

    kind: str
    location: str


# ------------------------------------------------------------------------------------------------------ finding a model


def find_model(name: str | os.PathLike) -> FoundModel:
    """What a name, folder, file or Hub id stands for. Of a Hub repository only its index is fetched."""
    given = os.fspath(name)
    location = NAMES.get(given, given)
    if os.path.isfile(location):
        return FoundModel("released", location)
    if given == EMBEDDED and not os.path.isdir(location):
        raise ValueError(f"The embedded model is not installed: {location!r} should hold it.")
    folder = model_folder(location, ["model_index.json"])
    index = folder / "model_index.json"
    if not index.is_file():
        if os.path.isdir(location) and not _checkpoints(folder):
            raise ValueError(f"The folder {location!r} holds no model; {WHAT_A_MODEL_CAN_BE}.")
        return FoundModel("released", location)
    kind = _read_index(index).get("_class_name")
    kinds = {"UniViGUPipeline": "univigu", "WanPipeline": "wan"}
    if kind not in kinds:
        raise ValueError(f"{location!r} holds a {kind}, which cannot become a Uni-ViGU model; {WHAT_A_MODEL_CAN_BE}.")
    return FoundModel(kinds[kind], location)


def load(
    name: str | os.PathLike = EMBEDDED,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    wan_model: str | os.PathLike = WAN_1_3B_REPO,
) -> UniViGUPipeline:
    """Load any model, ready to run.

    Args:
        name: the embedded model's name or one of `NAMES`, a folder, a released checkpoint or a Hub id.
        device: a GPU where there is one, else the CPU.
        dtype: of transformer and prompt encoder; bfloat16 on a GPU, float32 on a CPU. The autoencoder stays float32.
        wan_model: the Wan2.1 model that a released checkpoint takes its prompt encoder and autoencoder from.
    """
    device = pick_device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    found = find_model(name)
    if found.kind == "wan":
        pipe = load_wan(found.location, dtype=dtype)
    elif found.kind == "released":
        pipe = load_released(found.location, wan_model, dtype=dtype)
    else:
        pipe = _from_pretrained(UniViGUPipeline, found.location, dtype)
    return pipe.to(device)


def pick_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"There is no device {str(device)!r} here; give cpu, cuda or cuda:0.") from None
    return device


def model_folder(location: str, patterns: list[str]) -> Path:
    """A local folder, or the Hub repository's files of these patterns."""
    if os.path.isdir(location):
        return Path(location)
    unknown = f"There is no model {location!r}; {WHAT_A_MODEL_CAN_BE}."
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", location):  # no Hub id: do not ask the network about a slip of the pen
        raise ValueError(unknown)
    try:
        return Path(snapshot_download(location, allow_patterns=patterns))
    except HFValidationError:
        raise ValueError(unknown) from None
    except OSError as error:  # no such repository, no access to it, or no network
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"The model {location!r} is no folder here, and the Hub could not give it ({reason})."
        ) from error


def _read_index(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"'{path}' is damaged: it is not JSON.") from None


def _from_pretrained(pipeline_class, location: str, dtype: torch.dtype, **components):
    """A diffusers pipeline whose damaged or missing parts are one sentence."""
    try:
        # Latents lose visible detail in a half-precision autoencoder, and it is a small part of the work.
        dtypes = {"default": dtype, "vae": torch.float32, "previewer": torch.float32}
        return pipeline_class.from_pretrained(location, dtype=dtypes, **components)
    except (OSError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"The model in {location!r} cannot be loaded: {reason}.") from error


# ---------------------------------------------------------------------------------------------------- starting from Wan


def load_wan(
    path_or_repo: str | os.PathLike,
    *,
    caption_flow: str = "embedding",
    dtype: torch.dtype = torch.float32,
    flow_shift: float = WAN_SHIFT_480P,
    seed: int = 0,
    previewer: bool = False,
    prompt_encoder: bool = True,
    **token_config,
) -> UniViGUPipeline:
    """Start from a Wan2.1 text-to-video pipeline: it generates as Wan does, and its captions wait to be trained.

    Args:
        path_or_repo: a diffusers folder or Hub id of a `WanPipeline`.
        caption_flow: `"embedding"` (the paper) or `"mixture"` (the released weights' flow).
        flow_shift: the video's time shift: 3 for 480p, 5 for 720p.
        seed: of the new weights.
        previewer: fit the linear previewer, at the price of a few passes of the autoencoder.
        prompt_encoder: False leaves it out, for who has the prompts' embeddings: it can be larger than the network.
        token_config: how the token stream is built; see `UniViGUTransformer3DModel.from_wan`.
    """
    if caption_flow not in ("embedding", "mixture"):
        raise ValueError(f"caption_flow is 'embedding' or 'mixture', not {caption_flow!r}.")
    left_out = {} if prompt_encoder else {"text_encoder": None}
    wan = _load_wan_pipeline(path_or_repo, dtype, **left_out)
    vocab_size = _prompt_vocabulary(path_or_repo)
    if caption_flow == "mixture":
        token_config = {"token_state": "ids", "normalize_token_embedding": False, **token_config}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        transformer = UniViGUTransformer3DModel.from_wan(wan.transformer, vocab_size, **token_config)
    if caption_flow == "mixture":
        token_scheduler = MixtureFlowScheduler(vocab_size)
    else:
        shift = caption_shift(transformer.token_embedding.table.embedding_dim, CAPTION_ENTROPY)
        prediction = "logits" if transformer.config.token_head == "logits" else "clean"
        token_scheduler = EmbeddingFlowScheduler(prediction_type=prediction, shift=shift)
    return _pipeline(wan, transformer, token_scheduler, flow_shift, previewer, prompt_as_tokens=False)


def _prompt_vocabulary(path_or_repo: str | os.PathLike) -> int:
    path = model_folder(os.fspath(path_or_repo), ["text_encoder/config.json"]) / "text_encoder/config.json"
    if not path.is_file():
        raise ValueError(f"{os.fspath(path_or_repo)!r} holds no text_encoder/config.json, which says its vocabulary.")
    return _read_index(path)["vocab_size"]


def _load_wan_pipeline(path_or_repo: str | os.PathLike, dtype: torch.dtype, **components) -> WanPipeline:
    location = os.fspath(path_or_repo)
    parts = {"transformer", "text_encoder", "tokenizer", "vae", "scheduler"} - components.keys()
    folder = model_folder(location, ["model_index.json", *(f"{part}/*" for part in sorted(parts))])
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{location!r} holds no model_index.json, so it is not a Wan pipeline in diffusers' format.")
    index = _read_index(folder / "model_index.json")
    if index.get("_class_name") != "WanPipeline":
        raise ValueError(
            f"{location!r} holds a {index.get('_class_name')}, not a WanPipeline; give a Wan2.1 text-to-video model "
            f"such as {WAN_1_3B_REPO}."
        )
    if index.get("transformer_2", [None])[0] is not None or index.get("expand_timesteps"):
        raise ValueError(f"{location!r} is a Wan2.2 model; Uni-ViGU starts from Wan2.1, such as {WAN_1_3B_REPO}.")
    return _from_pretrained(WanPipeline, str(folder), dtype, **components)


def _pipeline(wan: WanPipeline, transformer, token_scheduler, flow_shift: float, previewer: bool, **settings):
    pipe = UniViGUPipeline(
        tokenizer=wan.tokenizer,
        text_encoder=wan.text_encoder,
        transformer=transformer.eval(),
        vae=wan.vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=flow_shift),
        token_scheduler=token_scheduler,
        **settings,
    )
    if previewer:
        pipe.fit_previewer()
    return pipe


# --------------------------------------------------------------------------------------------- the released checkpoint


def load_released(
    path_or_repo: str | os.PathLike = RELEASED_REPO,
    wan_model: str | os.PathLike = WAN_1_3B_REPO,
    *,
    dtype: torch.dtype = torch.float32,
    flow_shift: float = WAN_SHIFT_480P,
    jumps: str = "euler",
    previewer: bool = False,
) -> UniViGUPipeline:
    """Load the authors' released checkpoint: its transformer, with prompt encoder and autoencoder of a Wan2.1 model.

    Args:
        path_or_repo: the `.pth` or `.safetensors` file, or a folder or Hub repository that holds just one.
        wan_model: a diffusers folder or Hub id of the Wan2.1 model it was trained on.
        jumps: `"euler"`, or `"resample"`, the released joint sampler; see `MixtureFlowScheduler`.
        previewer: fit the linear previewer, at the price of a few passes of the autoencoder.
    """
    path = _checkpoint_file(os.fspath(path_or_repo))
    config, weights = convert_released(read_released(path))
    wan = _load_wan_pipeline(wan_model, dtype, transformer=None)
    _check_that_they_fit(config, wan, path.name, os.fspath(wan_model))
    with init_empty_weights():
        transformer = UniViGUTransformer3DModel(**config)
    kept = set(UniViGUTransformer3DModel._keep_in_fp32_modules)
    for name, weight in weights.items():
        weights[name] = weight.to(torch.float32 if kept & set(name.split(".")) else dtype)
    transformer.load_state_dict(weights, assign=True)
    token_scheduler = MixtureFlowScheduler(config["vocab_size"], jumps=jumps)
    return _pipeline(wan, transformer, token_scheduler, flow_shift, previewer, **RELEASED_SETTINGS)


def read_released(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The released model's state dict from a `.pth` with a "model" entry, a bare state dict or safetensors, without
    what FSDP and torch.compile put into its keys. Tensors alone are read; a file that wants more is refused."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no checkpoint '{path}'.")
    if path.stat().st_size == 0:
        raise ValueError(f"'{path.name}' is an empty file, not a checkpoint.")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
            prefix = "state_dict."
            state = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)} or state
        else:
            # files from before torch 1.6 are no zip archives and cannot be mapped into memory
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch muses about the pickle protocol; the answer below is plainer
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise ValueError(f"'{path.name}' cannot be read: it is cut short or not a checkpoint.") from None
        raise ValueError(
            f"'{path.name}' holds more than tensors (it asks for {wanted[1]}), and loading that could run any code; if "
            f"you trust it, convert it once with: state = torch.load('{path.name}', weights_only=False)['model']; "
            f"safetensors.torch.save_file({{k: v.contiguous() for k, v in state.items()}}, "
            f"'{path.stem}.safetensors')."
        ) from None
    except Exception:  # of bytes that are no checkpoint, the readers fail in every way there is
        raise ValueError(f"'{path.name}' cannot be read: it is cut short or not a checkpoint.") from None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"'{path.name}' holds no state dict; the released checkpoint has one under \"model\".")
    return {WRAPPERS.sub("", key): value for key, value in state.items()}


def convert_released(state: dict[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The released transformer's state dict as ours: (config, state dict). The config is read off the shapes."""
    required = (
        "vocab_embed.weight",
        "blocks.0.ffn.net.0.proj.weight",
        "patch_embedding.weight",
        "text_head.linear.weight",
    )
    missing = [key for key in required if key not in state]
    if missing:
        held = ", ".join(sorted(state)[:3])
        raise ValueError(
            f"This is not a released Uni-ViGU checkpoint: it lacks {', '.join(missing)} and holds {held}, …."
        )
    inner_dim, in_channels, *patch_size = state["patch_embedding.weight"].shape
    frequencies = state.get(TOKEN_FREQUENCIES)
    head_dim = 128 if frequencies is None else 2 * len(frequencies)  # 128 in every Wan
    if frequencies is not None:
        ours = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        if not torch.allclose(frequencies.float(), ours, rtol=1e-2):
            raise ValueError(f"{TOKEN_FREQUENCIES} does not have base 10000, so its token positions are not ours.")
    converted = {_our_name(key): weight for key, weight in state.items() if key != TOKEN_FREQUENCIES}

    def size(key: str, axis: int) -> int | None:
        return converted[key].shape[axis] if key in converted else None

    config = {
        "patch_size": tuple(patch_size),
        "num_attention_heads": inner_dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": (size("proj_out.weight", 0) or 0) // math.prod(patch_size) or in_channels,
        "text_dim": size("condition_embedder.text_embedder.linear_1.weight", 1) or 4096,
        "freq_dim": size("condition_embedder.time_embedder.linear_1.weight", 1) or 256,
        "ffn_dim": size("blocks.0.ffn.net.0.proj.weight", 0),
        "num_layers": 1 + max(int(match[1]) for key in converted if (match := re.match(r"blocks\.(\d+)\.", key))),
        "cross_attn_norm": "blocks.0.norm2.weight" in converted,
        "vocab_size": size("token_embedding.table.weight", 0),
        "token_state": "ids",
        "token_head": "logits",
        "normalize_token_embedding": False,
        "token_ffn_dim": size("blocks.0.token_ffn.net.0.proj.weight", 0),
    }
    with torch.device("meta"):
        expected = {key: weight.shape for key, weight in UniViGUTransformer3DModel(**config).state_dict().items()}
    problems = [f"{_released_name(key)} is missing" for key in expected if key not in converted]
    problems += [f"{_released_name(key)} has no place" for key in converted if key not in expected]
    problems += [
        f"{_released_name(key)} is {tuple(weight.shape)} where {tuple(expected[key])} is needed"
        for key, weight in converted.items()
        if key in expected and weight.shape != expected[key]
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"The checkpoint's weights do not fit together: {'; '.join(problems[:5])}{more}.")
    return config, converted


def _our_name(key: str) -> str:
    key = key.replace(".ffn_t.", ".token_ffn.")
    return next((new + key.removeprefix(old) for old, new in RELEASED_PREFIXES.items() if key.startswith(old)), key)


def _released_name(key: str) -> str:
    key = key.replace(".token_ffn.", ".ffn_t.")
    return next((new + key.removeprefix(old) for new, old in RELEASED_PREFIXES.items() if key.startswith(old)), key)


def _check_that_they_fit(config: dict[str, Any], wan: WanPipeline, name: str, wan_name: str) -> None:
    inner_dim = config["num_attention_heads"] * config["attention_head_dim"]
    channels, text_dim = wan.vae.config.z_dim, wan.text_encoder.config.d_model
    if config["in_channels"] != channels:
        shape = (inner_dim, config["in_channels"], *config["patch_size"])
        problem = f"patch_embedding.weight is {shape}, but this autoencoder's latents have {channels} channels"
    elif config["text_dim"] != text_dim:
        shape = (inner_dim, config["text_dim"])
        problem = f"cond_text_embedder.linear_1.weight is {shape}, but this prompt encoder's width is {text_dim}"
    elif not wan.tokenizer.vocab_size <= config["vocab_size"] <= wan.text_encoder.config.vocab_size:
        shape = (config["vocab_size"], inner_dim)
        problem = f"vocab_embed.weight is {shape}, but this tokenizer has {wan.tokenizer.vocab_size} words"
    else:
        return
    raise ValueError(
        f"'{name}' does not fit the Wan model {wan_name!r}: {problem}; give the Wan2.1 model it was trained on."
    )


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".pth", ".safetensors"))


def _checkpoint_file(location: str) -> Path:
    location = NAMES.get(location, location)
    if os.path.isfile(location):
        return Path(location)
    if location.endswith((".pth", ".safetensors")):
        raise ValueError(f"There is no checkpoint {location!r}.")
    found = _checkpoints(model_folder(location, ["*.pth", "*.safetensors"]))
    if len(found) != 1:
        held = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"{location!r} should hold one checkpoint (.pth or .safetensors) but holds {held}; give the file."
        )
    return found[0]


# ---------------------------------------------------------------------------------------------------------------- LoRA


def load_lora(pipe: UniViGUPipeline, path: str | os.PathLike) -> None:
    """Attach a LoRA to the transformer: one of ours, or one made for Wan2.1 in any form that diffusers converts."""
    path = os.fspath(path)
    if not os.path.exists(path):
        raise ValueError(f"There is no LoRA {path!r}; give a folder or a .safetensors file.")
    try:
        state, metadata = pipe.lora_state_dict(path, use_safetensors=True, return_lora_metadata=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError):
        raise ValueError(f"{path!r} holds no LoRA that can be read; give a folder or a .safetensors file.") from None
    state = {key.removeprefix("transformer."): weight for key, weight in state.items()}
    metadata = {key.removeprefix("transformer."): value for key, value in (metadata or {}).items()} or None
    layers = {name: layer for name, layer in pipe.transformer.named_modules() if isinstance(layer, torch.nn.Linear)}
    problems = []
    for key, weight in state.items():
        name, _, matrix = key.partition(".lora_")
        if name not in layers or matrix[:2] not in ("A.", "B."):
            problems.append(f"{key} has no place")
            continue
        width, needed = weight.shape[0], layers[name].out_features
        if matrix.startswith("A."):
            width, needed = weight.shape[1], layers[name].in_features
        if width != needed:
            problems.append(f"{key} is {tuple(weight.shape)} where the model's width is {needed}")
    if problems or not state:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"The LoRA {path!r} does not fit this model: {'; '.join(problems[:3]) or 'it is empty'}{more}."
        )
    pipe.transformer.load_lora_adapter(state, prefix=None, metadata=metadata)
