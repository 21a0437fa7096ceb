"""Figures of videos against what they are defined to be, and CLIP's agreement against transformers' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from k5dist.compose import compose, to_run_config
from k5dist.config import ConfigError
from k5dist.model.figures import LUMA, TextAgreement, clip_pixels, motion_and_flicker
from k5dist.model.pretrained import check_clip
from k5dist.train.history import LossHistory


def grey(levels: list[float], side: int = 16) -> np.ndarray:
    return np.stack([np.full((side, side, 3), level, np.uint8) for level in levels])


def test_figures_of_pictures_that_are_known() -> None:
    assert motion_and_flicker(grey([80] * 5)) == {"motion": 0, "flicker": 0}
    alternating = motion_and_flicker(grey([90, 110] * 4))
    assert alternating == pytest.approx({"motion": 20, "flicker": 10}, rel=1e-5)
    fading = motion_and_flicker(grey([10, 20, 30, 40]))
    assert fading == pytest.approx({"motion": 10, "flicker": 0}, abs=1e-4)
    assert set(motion_and_flicker(grey([1, 2]))) == {"motion"}
    assert motion_and_flicker(grey([1])) == {}


def test_figures_are_those_of_a_plain_loop() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 24, 40, 3), np.uint8)
    luma = [[[float(pixel @ LUMA) for pixel in row] for row in frame.astype(np.float32)] for frame in frames]
    y = np.array(luma)
    motion = np.mean([np.abs(y[t + 1] - y[t]).mean() for t in range(5)])
    blocks = np.array(
        [[[y[t, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].mean() for j in range(5)] for i in range(3)] for t in range(6)]
    )
    flicker = np.mean([np.abs(blocks[t - 1] - 2 * blocks[t] + blocks[t + 1]).mean() / 4 for t in range(1, 5)])
    assert motion_and_flicker(frames) == pytest.approx({"motion": motion, "flicker": flicker}, rel=1e-4)


def test_texture_that_moves_flickers_less_than_light_that_does() -> None:
    stripes = np.stack([np.tile(127 * (1 + np.sin((np.arange(64) + t) * np.pi / 4)), (64, 1)) for t in range(8)])
    moving = motion_and_flicker(np.repeat(stripes[..., None], 3, -1).astype(np.uint8))
    assert moving["motion"] > 20
    assert moving["flicker"] < 0.5


@pytest.fixture
def clip_folder(tmp_path: Path, tiny_t2v: Path) -> Path:
    tokenizer = CLIPTokenizer.from_pretrained(tiny_t2v / "tokenizer_2")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_agreement_is_the_cosine_of_both_towers(clip_folder: Path) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (3, 48, 80, 3), np.uint8)
    agreement = TextAgreement(str(clip_folder), "cpu")
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(["a red car"], return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=clip_pixels(frames, 32), **tokens).logits_per_image[:, 0] / model.logit_scale.exp()
    expected = float((100 * logits.clamp(min=0)).mean())
    assert agreement.score(frames, "a red car") == pytest.approx(expected, abs=1e-3)
    assert agreement.score(frames, "a red car") != agreement.score(frames, "snow on a mountain")


def test_pixels_are_those_of_clips_own_preprocessing() -> None:
    from PIL import Image

    smooth = np.linspace(0, 255, 48 * 80 * 3).reshape(1, 48, 80, 3).astype(np.uint8)
    ours = clip_pixels(smooth, 32)
    resized = np.asarray(Image.fromarray(smooth[0]).resize((53, 32), Image.Resampling.BICUBIC), np.float32) / 255
    middle = resized[:, 10:42].transpose(2, 0, 1)
    mean = np.array([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    deviation = np.array([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    assert ours.shape == (1, 3, 32, 32)
    np.testing.assert_allclose(ours[0].numpy(), (middle - mean) / deviation, atol=0.03)


def test_a_folder_without_an_image_tower_is_refused(tiny_t2v: Path, clip_folder: Path) -> None:
    def checked(folder: Path) -> None:
        check_clip(to_run_config(compose(["+flavour=t2v-tiny", f"validation.clip_model={folder}"])))

    checked(clip_folder)
    with pytest.raises(ConfigError, match="image towers"):
        checked(tiny_t2v / "text_encoder_2")
    with pytest.raises(ConfigError, match=r"config\.json"):
        checked(tiny_t2v)


def test_patience_counts_validations_since_the_best() -> None:
    history = LossHistory(
        {}, {0: {"loss": 0.1}, 2: {"loss": 0.5}, 4: {"loss": 0.3}, 6: {"loss": 0.3}, 8: {"loss": 0.4}}
    )
    assert history.best_step == 4, "the first of equal ones, and never step 0"
    assert [history.exhausted(patience) for patience in (None, 1, 2, 3)] == [False, True, True, False]
    assert not LossHistory({}, {0: {"loss": 1.0}}).exhausted(1)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["validation.seeds=[]"], "validation.seeds"),
        (["validation.seeds=[1,1]"], "validation.seeds"),
        (["validation.compare=[best]"], "validation.compare"),
        (["validation.patience=0"], "validation.patience"),
        (["validation.patience=2", "data.held_out=0"], "validation.patience"),
        (["validation.patience=2", "validation.every=0"], "validation.patience"),
        (["export.checkpoint=newest"], "export.checkpoint"),
        (["export.checkpoint=best", "data.held_out=0"], "export.checkpoint"),
        (["export.checkpoint=best", "stages=[train,export]"], "export.checkpoint"),
        (["export.checkpoint=best", "checkpoint.keep_best=false"], "export.checkpoint"),
        (["validation.clip_model=s3://user:word@host/clip"], "validation.clip_model"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_run_config(compose(["+flavour=t2v-tiny", *overrides]))
    assert caught.value.key == key
