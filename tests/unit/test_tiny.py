"""The tiny checkpoint is whole, is the same each time, and has none of the blind spots that random weights have."""

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from k5dist.model.tiny import build_tiny_checkpoint

ARCHITECTURE: dict[str, Any] = {
    "model_dim": 64,
    "ff_dim": 128,
    "time_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 4,
    "axes_dims": (8, 12, 12),
    "in_text_dim": 64,
    "in_text_dim2": 32,
    "attention_type": "regular",
}
NABLA: dict[str, Any] = {
    **{"attention_type": "nabla", "attention_P": 0.8, "attention_add_sta": True},
    **{"attention_wT": 11, "attention_wW": 3, "attention_wH": 3},
}
PROMPTS = ["a red car", "", "A dog's 2 tails\nwag.", "  spaces", "—日本 🙂", "<|im_end|>", "x" * 400, "ing the camera"]
SCALE = 0.476986


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "made" / "t2v"
    build_tiny_checkpoint(folder, task="t2v", architecture=ARCHITECTURE)
    return folder


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "i2v"
    build_tiny_checkpoint(folder, task="i2v", architecture=ARCHITECTURE)
    return folder


@pytest.fixture(scope="module")
def pipeline(t2v: Path) -> Any:
    pipeline = Kandinsky5T2VPipeline.from_pretrained(t2v, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def vae(t2v: Path) -> Any:
    return AutoencoderKLHunyuanVideo.from_pretrained(t2v / "vae")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    yield
    torch.set_num_threads(threads)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pictures(seed: int, *, contrast: float = 0.5, frames: int = 17) -> torch.Tensor:
    """A panning picture of soft discs on a gradient, unlike what the VAE was scaled on: [1, 3, T, 64, 96]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:64, 0:96] / 64.0
    clip = np.empty((3, frames, 64, 96))
    gradient = rng.uniform(-1, 1, (3, 2))
    discs = [(rng.uniform(0, 1.5, 2), rng.uniform(0.05, 0.4), rng.uniform(-1.5, 1.5, 3)) for _ in range(12)]
    pan = rng.uniform(-0.03, 0.03, 2)
    for t in range(frames):
        clip[:, t] = gradient[:, 0, None, None] * (y - 0.5) + gradient[:, 1, None, None] * (x - 0.75)
        for (cx, cy), radius, colour in discs:
            inside = 1 / (1 + np.exp(60 * (np.hypot(x - cx - t * pan[0], y - cy - t * pan[1]) - radius)))
            clip[:, t] += colour[:, None, None] * inside
    clip = clip / clip.std() * contrast
    return torch.from_numpy(clip).float().clamp(-1, 1)[None]


# Identity


@pytest.mark.usefixtures("one_thread")
def test_equal_arguments_give_equal_bytes_whatever_the_number_of_threads(t2v: Path, tmp_path: Path) -> None:
    build_tiny_checkpoint(tmp_path, task="t2v", architecture={**ARCHITECTURE, "axes_dims": [8, 12, 12]})
    assert digests(tmp_path) == digests(t2v)


def test_the_seed_changes_all_weights(t2v: Path, tmp_path: Path) -> None:
    build_tiny_checkpoint(tmp_path, task="t2v", architecture=ARCHITECTURE, seed=1)
    ours, theirs = digests(tmp_path), digests(t2v)
    assert {name for name in ours if ours[name] != theirs[name]} == {n for n in ours if n.endswith(".safetensors")}


def test_tasks_and_architectures_share_vae_and_text_encoders(t2v: Path, i2v: Path, tmp_path: Path) -> None:
    build_tiny_checkpoint(tmp_path, task="t2v", architecture={**ARCHITECTURE, "num_visual_blocks": 1, **NABLA})
    for other in (i2v, tmp_path):
        for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
            assert digests(other / part) == digests(t2v / part)
    assert digests(tmp_path / "transformer") != digests(t2v / "transformer")


def test_the_caller_keeps_its_random_state(tmp_path: Path) -> None:
    torch.manual_seed(20)  # a state that no build leaves behind
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    build_tiny_checkpoint(tmp_path, task="t2v", architecture=ARCHITECTURE)
    after = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


# Loading


@pytest.mark.parametrize(("task", "shift"), [("t2v", 10.0), ("i2v", 5.0)])
def test_every_component_loads_by_itself(task: str, shift: float, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(task)
    transformer: Any = Kandinsky5Transformer3DModel.from_pretrained(folder, subfolder="transformer")
    assert transformer.config.axes_dims == [8, 12, 12]
    assert (transformer.config.in_visual_dim, transformer.config.visual_cond) == (16, True)
    AutoencoderKLHunyuanVideo.from_pretrained(folder, subfolder="vae")
    loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, subfolder="text_encoder", output_loading_info=True
    )
    qwen, report = loaded
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert qwen.config.text_config.hidden_size == 64
    assert CLIPTextModel.from_pretrained(folder, subfolder="text_encoder_2").config.hidden_size == 32
    assert isinstance(AutoTokenizer.from_pretrained(folder / "tokenizer"), Qwen2Tokenizer)
    assert isinstance(AutoTokenizer.from_pretrained(folder / "tokenizer_2"), CLIPTokenizer)
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    assert scheduler.config.shift == shift


def test_the_index_names_the_pipeline(t2v: Path, i2v: Path) -> None:
    assert type(DiffusionPipeline.from_pretrained(t2v, local_files_only=True)) is Kandinsky5T2VPipeline
    assert type(DiffusionPipeline.from_pretrained(i2v, local_files_only=True)) is Kandinsky5I2VPipeline
    assert json.loads((t2v / "model_index.json").read_text())["tokenizer"] == ["transformers", "Qwen2Tokenizer"]


def test_weights_are_fp32_safetensors_only(t2v: Path) -> None:
    assert not [path for path in t2v.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt")]
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        (file,) = (t2v / part).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


# Text


def test_the_template_is_cropped_to_the_token(pipeline: Any) -> None:
    crop, tokenizer = pipeline.prompt_template_encode_start_idx, pipeline.tokenizer
    head, tail = pipeline.prompt_template.split("{}")
    for prompt in PROMPTS:
        text = prompt.strip()  # as the pipeline cleans it
        tokens = tokenizer(head + text + tail)["input_ids"]
        assert tokenizer.decode(tokens[:crop]) == head
        assert tokenizer.decode(tokens[crop:]) == text + tail


def test_prompts_differ_behind_the_crop(pipeline: Any) -> None:
    crop = pipeline.prompt_template_encode_start_idx
    kept = [tuple(pipeline.tokenizer(pipeline.prompt_template.format(p))["input_ids"][crop:]) for p in PROMPTS]
    assert len(set(kept)) == len(PROMPTS)


@torch.no_grad()
def test_text_features_depend_on_the_words_before(pipeline: Any) -> None:
    qwen, clip, lengths = pipeline.encode_prompt(["red car drives", "big car drives", "a much longer prompt, padded"])
    assert qwen.shape[0] == 3
    assert (qwen.shape[2], clip.shape) == (64, (3, 32))
    assert lengths.diff()[0] < lengths.diff()[2]
    alone = pipeline.encode_prompt("red car drives")[0]
    torch.testing.assert_close(alone[0], qwen[0, : alone.shape[1]], rtol=1e-4, atol=1e-4)
    assert (clip[0] - clip[1]).abs().mean() > 0.01
    one, two = (pipeline.encode_prompt(f"{word} car drives")[0][0, -4:] for word in ("the", "and"))
    assert (one - two).abs().mean() > 0.01


def test_clip_tokenizer_is_as_the_real_one(t2v: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(t2v / "tokenizer_2")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|startoftext|>", "<|endoftext|>")
    assert (tokenizer.pad_token, tokenizer.model_max_length) == ("<|endoftext|>", 77)
    tokens: Any = tokenizer(["A Zebra walks", "日本"], padding="max_length", truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape == (2, 77)
    assert (tokens["input_ids"][:, 0] == tokenizer.bos_token_id).all()
    assert tokenizer.decode(tokens["input_ids"][0], skip_special_tokens=True) == "a zebra walks"
    assert int(tokens["attention_mask"][1].sum()) > 2
    assert (tokenizer.unk_token_id == tokens["input_ids"][1][tokens["attention_mask"][1] == 1]).sum() == 1  # the end


# Latents


@torch.no_grad()
def test_latents_have_unit_scale_and_tell_clips_apart(vae: Any) -> None:
    means = []
    for seed, contrast in ((0, 0.5), (1, 0.5), (2, 0.2)):
        posterior = vae.encode(pictures(seed, contrast=contrast)).latent_dist
        assert posterior.mean.shape == (1, 16, 5, 8, 12)
        scaled = posterior.mean * SCALE
        assert 0.6 < scaled.std() < 1.5
        assert scaled.mean().abs() < 0.3
        assert -7 < posterior.logvar.mean() < -5
        assert posterior.logvar.max() < 0
        means.append(scaled.flatten())
    assert torch.corrcoef(torch.stack(means)).triu(1).abs().max() < 0.8


@torch.no_grad()
@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (17, 5), (21, 6)])
def test_latent_frames(vae: Any, frames: int, latent_frames: int) -> None:
    mean = vae.encode(pictures(0, frames=frames)).latent_dist.mean
    assert mean.shape == (1, 16, latent_frames, 8, 12)
    assert vae.decode(mean).sample.shape == (1, 3, frames, 64, 96)


# Generation


def generate(pipeline: Any, prompt: str, *, output_type: str = "np", **options: Any) -> np.ndarray:
    frames = pipeline(
        prompt=prompt,
        **{"height": 64, "width": 96, "num_frames": 17, "num_inference_steps": 2, "guidance_scale": 1.0},
        generator=torch.Generator().manual_seed(0),
        output_type=output_type,
        **options,
    ).frames[0]
    return np.asarray(frames)


def test_text_to_video_follows_the_prompt(pipeline: Any) -> None:
    car, again, bird = (generate(pipeline, prompt) for prompt in ("a red car", "a red car", "a blue bird flies"))
    assert car.shape == (17, 64, 96, 3)
    assert np.isfinite(car).all()
    assert car.std() > 0.05
    np.testing.assert_array_equal(car, again)
    assert np.abs(car - bird).mean() > 0.005


def test_every_block_reaches_the_output(pipeline: Any) -> None:
    whole = generate(pipeline, "a red car", output_type="latent")
    transformer = pipeline.transformer
    for blocks in (transformer.text_transformer_blocks, transformer.visual_transformer_blocks):
        for index, block in enumerate(blocks):
            blocks[index] = torch.nn.Identity()
            blocks[index].forward = lambda hidden, *_: hidden  # type: ignore[method-assign]
            without = generate(pipeline, "a red car", output_type="latent")
            blocks[index] = block
            assert np.abs(whole - without).mean() > 0.005, f"block {index}"


def test_image_to_video_runs(i2v: Path) -> None:
    pipeline: Any = Kandinsky5I2VPipeline.from_pretrained(i2v, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = [Image.fromarray((255 * (pictures(s)[0, :, 0] / 2 + 0.5)).byte().permute(1, 2, 0).numpy()) for s in (0, 1)]
    one, two = (generate(pipeline, "a red car", image=image) for image in images)
    assert np.isfinite(one).all()
    assert np.abs(one - two).mean() > 0.005


# Refusals


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_visual_block": 4}, "did you mean num_visual_blocks"),
        ({"ff_dim": None}, "ff_dim is missing"),
        ({"in_visual_dim": 4}, "in_visual_dim=4: every video model has 16"),
        ({"model_dim": 48}, "model_dim=48: must be a multiple of the head size 32"),
        ({"axes_dims": (8, 11, 13)}, "even"),
        ({"in_text_dim": 40}, "in_text_dim=40: must be a multiple of 16"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        build_tiny_checkpoint(tmp_path / "x", task="t2v", architecture={**ARCHITECTURE, **change})
    assert not (tmp_path / "x").exists()


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task='v2v': must be one of t2v, i2v"):
        build_tiny_checkpoint(tmp_path, task="v2v", architecture=ARCHITECTURE)


def test_a_whole_transformer_config_is_taken(tmp_path: Path) -> None:
    whole = {"in_visual_dim": 16, "out_visual_dim": 16, "visual_cond": True, "patch_size": [1, 2, 2], **NABLA}
    build_tiny_checkpoint(tmp_path, task="i2v", architecture={**ARCHITECTURE, **whole})
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert {key: config[key] for key in NABLA} == NABLA
