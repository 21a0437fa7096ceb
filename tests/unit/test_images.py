"""Validation images: encoded once for the videos' sides, again when they change; bad lists are refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from k5dist.cache import layout
from k5dist.compose import compose, to_run_config
from k5dist.config import ConfigError
from k5dist.model.encoders import VideoAutoencoder
from k5dist.plan import ClusterFacts, make_plan
from k5dist.precache.images import encode_images
from tests.unit.models import random_frames


def test_images_are_encoded_once(tiny_i2v: Path, tmp_path: Path) -> None:
    picture = random_frames(1)[0]
    Image.fromarray(picture).save(tmp_path / "a.png")
    settings = ["+flavour=i2v-tiny", f"pretrained={tiny_i2v}", f"storage.root={tmp_path}", "validation.prompts=[a]"]
    config = to_run_config(compose([*settings, f"validation.images=[{tmp_path}/a.png]"]))
    plan = make_plan(config, ClusterFacts(0), "generated:test")
    relative = os.path.relpath(tmp_path / "a.png")
    typed = to_run_config(compose([*settings, f"validation.images=[{relative}]"]))
    (image,) = make_plan(typed, ClusterFacts(0), "generated:test").config.validation.images
    assert os.path.isabs(image) and os.path.samefile(image, tmp_path / "a.png"), "workers have other working folders"
    assert encode_images(plan, "cpu") == 1
    mean = safetensors.torch.load_file(layout.image_uri(plan.run_uri, 0))["mean"]
    expected, _ = VideoAutoencoder(str(tiny_i2v), "cpu").encode(picture[None])
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-5)
    assert encode_images(plan, "cpu") == 0
    Image.fromarray(np.flipud(picture)).save(tmp_path / "a.png")
    assert encode_images(plan, "cpu") == 1
    os.truncate(tmp_path / "a.png", 20)
    with pytest.raises(ConfigError) as error:
        encode_images(plan, "cpu")
    assert error.value.key == "validation.images"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["+flavour=i2v-tiny", "validation.prompts=[a,b]", "validation.images=[x.png]"], "validation.images"),
        (["+flavour=t2v-tiny", "validation.prompts=[a]", "validation.images=[x.png]"], "validation.images"),
        (["+flavour=t2v-tiny", "train.first_frame_dropout=0.1"], "train.first_frame_dropout"),
        (["+flavour=i2v-tiny", "train.first_frame_dropout=2"], "train.first_frame_dropout"),
        (["+flavour=i2v-tiny", "validation.prompts=[a]", "validation.resolution=[96,96]"], "validation.resolution"),
    ],
)
def test_what_does_not_fit_is_refused(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        to_run_config(compose(overrides))
    assert error.value.key == key
