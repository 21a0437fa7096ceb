"""Masks: found beside their clips, cut as they are, on the latents' grid, in the samples' keys and in the loss."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from k5dist.cache import layout
from k5dist.compose import compose, to_run_config
from k5dist.config import RunConfig
from k5dist.precache import stages
from k5dist.precache.masks import NO_MASK, mask_uri, read_mask, to_grid
from k5dist.precache.sources import read_datasets
from k5dist.precache.video import VideoError, encode_mp4
from k5dist.train.objective import Clip, Objective
from tests.unit.models import CPU, SCALE, model_config, our_model, random, random_text

SUFFIX = ".mask.mp4"


def run_config(source: Path, suffix: str | None = SUFFIX) -> RunConfig:
    mapping = to_run_config(compose(["+flavour=t2v-tiny"])).to_mapping()
    mapping["data"] |= {"source": str(source), "mask_suffix": suffix}
    return RunConfig.from_mapping(mapping)


def clip_and_mask(folder: Path, name: str = "clip") -> Path:
    """24 frames of 128 × 192; the mask is white on the left, and from frame 8 on everywhere."""
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 128, 192, 3), dtype=np.uint8)
    mask = np.zeros_like(pixels)
    mask[:, :, :96] = 255
    mask[8:] = 255
    encode_mp4(pixels, folder / f"{name}.mp4", frame_rate=12)
    encode_mp4(mask, folder / f"{name}{SUFFIX}", frame_rate=12)
    (folder / f"{name}.txt").write_text("a clip")
    return folder


def probed(source: Path, suffix: str | None = SUFFIX) -> list[dict[str, Any]]:
    config = run_config(source, suffix)
    rows = read_datasets(config.datasets).rows.to_pylist()
    datasets = {dataset.name: dataset for dataset in config.datasets}
    found = []
    for row in rows:
        row |= {"error": "", "stage": "", "key": "", "crop": "", "mask": ""}
        found += stages.probe_clip(row, datasets=datasets, unit=16, facts={"first_frame": False})
    return found


def test_the_mask_has_the_clips_name() -> None:
    assert mask_uri("s3://b/a.b/clip.one.mov", ".mask.mp4") == "s3://b/a.b/clip.one.mask.mp4"
    assert mask_uri("/x/clip.mp4", ".mask.png") == "/x/clip.mask.png"


def test_the_grid_is_the_mean_over_what_a_latent_comes_from() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (9, 16, 24, 3), dtype=np.uint8)
    grid = to_grid(pixels)
    assert grid.shape == (3, 2, 3)
    assert grid[0, 1, 2] == pytest.approx(pixels[0, 8:16, 16:24].mean() / 255)
    assert grid[2, 0, 1] == pytest.approx(pixels[5:9, 0:8, 8:16].mean() / 255)
    assert to_grid(np.full((1, 8, 8, 3), 255, np.uint8)).tolist() == [[[1.0]]]


def test_a_mask_is_cut_as_its_clip_and_is_no_clip_itself(tmp_path: Path) -> None:
    (row,) = probed(clip_and_mask(tmp_path / "data"))
    assert row["uri"].endswith("/clip.mp4") and row["mask"].endswith("/clip.mask.mp4")
    assert (row["frames"], row["height"], row["width"]) == (17, 64, 96)
    decoded = stages.decode_row(row)
    grid = decoded["mask_grid"]
    assert decoded["error"] == "" and grid.shape == (5, 8, 12) and grid.dtype == np.float32
    assert np.allclose(grid[:2, :, :5], 1, atol=0.02) and np.allclose(grid[:2, :, 7:], 0, atol=0.02)
    assert np.allclose(grid[3:], 1, atol=0.02)
    assert np.allclose(grid[2, :, 7:], 0.25, atol=0.03), "frames 5 to 8, of which the last is white"
    later = read_mask(row | {"start": 0.5})
    assert np.allclose(later[2:], 1, atol=0.02)
    assert np.allclose(later[1, :, 7:], 0.75, atol=0.03), "frames 7 to 10, of which the first is black"


def test_keys_hang_on_the_mask(tmp_path: Path) -> None:
    data = clip_and_mask(tmp_path / "data")
    plain, masked = probed(data, None), probed(data)
    assert len(plain) == 1, "the mask has no caption: no clip either way"
    encode_mp4(np.zeros((24, 128, 192, 3), np.uint8), data / f"clip{SUFFIX}", frame_rate=12)
    keys = {row["key"] for row in (plain[0], masked[0], probed(data)[0])}
    assert len(keys) == 3
    assert stages.decode_row(plain[0])["mask_grid"] is NO_MASK


def test_an_image_is_the_mask_of_all_frames(tmp_path: Path) -> None:
    data = clip_and_mask(tmp_path / "data")
    picture = np.zeros((128, 192, 3), np.uint8)
    picture[:64] = 255
    Image.fromarray(picture).save(data / "clip.mask.png")
    (data / f"clip{SUFFIX}").unlink()
    grid = stages.decode_row(probed(data, ".mask.png")[0])["mask_grid"]
    assert grid.shape == (5, 8, 12)
    assert np.allclose(grid[:, :3], 1, atol=0.05) and np.allclose(grid[:, 5:], 0, atol=0.05)


def test_clips_without_a_mask_or_with_a_short_one_are_said(tmp_path: Path) -> None:
    data = clip_and_mask(tmp_path / "data")
    clip_and_mask(data, "other")
    (data / f"other{SUFFIX}").unlink()
    listing = read_datasets(run_config(data).datasets)
    assert listing.rejected.column("reason").to_pylist() == ["its mask other.mask.mp4: there is no such file"]
    encode_mp4(np.zeros((10, 128, 192, 3), np.uint8), data / f"clip{SUFFIX}", frame_rate=12)
    row = stages.decode_row(probed(data)[0])
    assert row["error"].startswith("its mask: too short") and row["stage"] == "decode"
    assert len(row["pixels"]) == 0
    (data / f"clip{SUFFIX}").unlink()
    with pytest.raises(VideoError, match=r"its mask: there is no clip\.mask\.mp4"):
        read_mask(row)


def test_a_mask_outside_the_source_is_not_read(tmp_path: Path) -> None:
    data = clip_and_mask(tmp_path / "data")
    (data / f"clip{SUFFIX}").rename(tmp_path / "elsewhere.mp4")
    (data / f"clip{SUFFIX}").symlink_to(tmp_path / "elsewhere.mp4")
    clip_and_mask(data, "other")
    listing = read_datasets(run_config(data).datasets)
    assert listing.rejected.column("reason").to_pylist() == [
        "its mask clip.mask.mp4: it lies outside the source's folder"
    ]


def test_the_cache_holds_the_mask(tmp_path: Path, tiny_t2v: Path) -> None:
    """Through the real stages of one worker: decode, VAE, shard, and back."""
    import pyarrow as pa

    (row,) = probed(clip_and_mask(tmp_path / "data"))
    grid = stages.decode_row(row)["mask_grid"]
    encoded = stages.VaeStage(str(tiny_t2v), "cpu", False)(stages.decode_row(row | {"group": 0}))
    assert encoded["error"] == "", encoded["error"]
    assert encoded["names"] == ["mean", "logvar", "mask"]
    table = pa.Table.from_pylist([{k: v for k, v in encoded.items() if k not in ("row", "captions")}])
    stages.write_samples(table, cache_uri=str(tmp_path / "cache"))
    store = layout.samples(str(tmp_path / "cache"))
    from k5dist.cache.shards import places

    tensors = store.read(places(store.index())[0])
    assert tensors["mask"].shape == (5, 8, 12, 1) and tensors["mask"].dtype == torch.bfloat16
    assert np.allclose(tensors["mask"][..., 0].float().numpy(), grid, atol=4e-3)


# In the loss


@pytest.mark.parametrize("first_frame", [False, True])
@pytest.mark.parametrize("background", [0.0, 0.25, 1.0])
def test_the_loss_is_the_masks_weighted_mean(
    tiny_t2v: Path, tiny_i2v: Path, first_frame: bool, background: float
) -> None:
    folder = tiny_i2v if first_frame else tiny_t2v
    train = dataclasses.replace(to_run_config(compose(["+flavour=t2v-tiny"])).train, mask_background=background)
    goal = Objective(
        model=model_config(folder),
        train=train,
        first_frame=first_frame,
        **{"shift": 5.0, "scaling_factor": SCALE, "draw": False, "device": CPU, "dtype": torch.float32},
    )
    mean = random(5, 8, 12, 16) / SCALE
    mask = (random(5, 8, 12, 1, seed=9) > 0.5).to(torch.bfloat16)
    clip = Clip("clip", mean, torch.full_like(mean, -3.0), mean[:1], mean[:1] * 0 - 3, random_text(6), mask)
    transformer = our_model(folder)
    with torch.no_grad():
        error, _ = goal._error(
            transformer, clip, clip.text, goal.sigma(0.4), (train.seed, 1, "clip"), draw=False, first_frame=first_frame
        )
        found = goal.training_loss(transformer, clip, clip.text, 1, 0.4)
        plain = goal.training_loss(transformer, dataclasses.replace(clip, mask_THW1=None), clip.text, 1, 0.4)
        white = dataclasses.replace(clip, mask_THW1=torch.ones_like(mask))
        black = dataclasses.replace(clip, mask_THW1=torch.zeros_like(mask))
        in_white, in_black = (goal.training_loss(transformer, c, c.text, 1, 0.4) for c in (white, black))
    weight = (background + (1 - background) * mask.double())[1 if first_frame else 0 :].expand(error.shape)
    torch.testing.assert_close(
        found.double(), (error.double().square() * weight).sum() / weight.sum(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(in_white, plain)
    if background:
        torch.testing.assert_close(in_black, plain)
    else:
        assert float(in_black) == 0
        assert abs(float(found / plain) - 1) > 1e-4
