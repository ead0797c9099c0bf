"""A whole pipeline of random weights, small enough to build in any test: real classes, 9 frames of 32 x 32."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from univigu import EmbeddingFlowScheduler, MixtureFlowScheduler, UniViGUPipeline, UniViGUTransformer3DModel

WORDS = [
    *("a", "the", "red", "green", "blue", "small", "large", "ball", "box", "boat", "star", "moves"),
    *("left", "right", "up", "down", "over", "sea", "meadow", "and", ",", "."),
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def tiny_wan(seed: int = 0, **config) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
            **config,
        }
    )


def tiny_transformer(seed: int = 0, vocab_size: int = len(WORDS) + 3, **config) -> UniViGUTransformer3DModel:
    model = UniViGUTransformer3DModel.from_wan(tiny_wan(seed), vocab_size, token_dim=8, **config)
    torch.nn.init.normal_(model.token_proj_out.weight)  # as after some training: not every word equally likely
    return model


def tiny_vae(seed: int = 0) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )


def tiny_pipeline(flow: str = "embedding", seed: int = 0):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    if flow == "embedding":
        transformer, token_scheduler = tiny_transformer(seed), EmbeddingFlowScheduler(shift=1.4)
    else:
        transformer = tiny_transformer(seed, token_state="ids", normalize_token_embedding=False)
        token_scheduler = MixtureFlowScheduler(vocab_size=len(tokenizer))
    return UniViGUPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder.eval(),
        transformer=transformer.eval(),
        vae=tiny_vae(seed).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        token_scheduler=token_scheduler,
        max_prompt_tokens=16,
        max_caption_tokens=12,
        default_num_frames=9,
        default_height=32,
        default_width=32,
        default_fps=8,
        default_steps=4,
        default_guidance_scale=2.0,
    )
