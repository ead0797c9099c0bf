"""The autoencoder's training: the same numbers as diffusers' own passes, and a decoder that can learn on alone."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan

from training.config import OptimConfig, RunConfig
from training.toybox.publish import _take_decoder
from training.trainer import train
from training.vae import VAEObjective, VAEObjectiveConfig, finish, measure_latents
from univigu.whole_clip import decode_clip, encode_clip

MODEL = {
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "base_dim": 8,
    "dim_mult": [1, 1, 1],
    "temperal_downsample": [True, True],
    "num_res_blocks": 1,
    "z_dim": 4,
    "is_residual": True,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}
SETTINGS = {"frames": (5,), "validation_clips": 1}


def objective(start: str = "", **changes) -> VAEObjective:
    return VAEObjective(MODEL, VAEObjectiveConfig(**SETTINGS, **changes), batch_size=1, seed=0, start=start)


def learn(objective: VAEObjective, folder) -> AutoencoderKLWan:
    """Two steps; the weights that come out."""
    run = RunConfig(folder=str(folder), steps=2, batch_size=1, workers=0, save_every=10, validate_every=10)
    assert train(objective, run, OptimConfig(name="muon", lr=1e-3, matrix_lr=1e-3)) == 0
    return AutoencoderKLWan.from_pretrained(folder / "weights").eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    learn(objective(), folder)
    return folder / "weights"


def test_the_decoder_learns_on_while_latents_stay_bit_for_bit(trained, tmp_path):
    before = AutoencoderKLWan.from_pretrained(trained).state_dict()
    after = learn(objective(str(trained), decoder_alone=True), tmp_path).state_dict()
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"decoder", "post_quant_conv"}


def through(vae: AutoencoderKLWan, clip: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return decode_clip(vae, encode_clip(vae, clip)[:, :4])


def test_a_model_takes_a_decoder_of_its_own_latents_and_no_other(trained, tmp_path):
    finish(trained, tmp_path / "finished", clips=8)
    learned = learn(objective(str(tmp_path / "finished"), decoder_alone=True), tmp_path / "decoder")
    vae = AutoencoderKLWan.from_pretrained(tmp_path / "finished")
    _take_decoder(vae, tmp_path / "decoder" / "weights")
    clip = torch.rand(1, 3, 5, 16, 16)
    torch.testing.assert_close(through(vae, clip), through(learned, clip), atol=2e-2, rtol=2e-2)  # in half precision
    learn(objective(str(trained)), tmp_path / "other")
    with pytest.raises(ValueError, match="makes other latents than the model's: encoder"):
        _take_decoder(vae, tmp_path / "other" / "weights")


@pytest.mark.parametrize("evenness", [0.0, 0.5, 1.0])
def test_evened_out_latents_have_the_variances_asked_for_and_decode_as_before(trained, tmp_path, evenness):
    before = AutoencoderKLWan.from_pretrained(trained).eval()
    finish(trained, tmp_path / "finished", clips=8, evenness=evenness)
    after = AutoencoderKLWan.from_pretrained(tmp_path / "finished").eval()
    clip = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    torch.testing.assert_close(through(after, clip), through(before, clip), atol=2e-2, rtol=2e-2)

    variances = torch.linalg.eigvalsh(measure_latents(before, 0, clips=8)[1]).flip(0) ** (1 - evenness)
    mean, covariance = measure_latents(after, 0, clips=8)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=2e-2, rtol=0)
    torch.testing.assert_close(covariance, torch.diag(variances / variances.mean()), atol=3e-2, rtol=3e-2)
    assert after.config.latents_mean == [0.0] * 4 and after.config.latents_std == [1.0] * 4
    with pytest.raises(ValueError, match="evenness is a number from 0"):
        finish(trained, tmp_path / "finished", clips=8, evenness=2.0)
