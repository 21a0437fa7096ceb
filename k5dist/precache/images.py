"""The pictures that validation videos of image-to-video begin with, encoded before the training starts."""

from __future__ import annotations

import safetensors.torch

from k5dist import storage
from k5dist.cache import layout
from k5dist.cache.keys import content_digest, key_of
from k5dist.config import ConfigError
from k5dist.model.encoders import VideoAutoencoder
from k5dist.model.weights import read_header
from k5dist.plan import RunPlan
from k5dist.precache.video import VideoError, decode_clip


def encode_images(plan: RunPlan, device: str) -> int:
    """Leave the mean [1, h, w, C] of each of `validation.images`, cut to the videos' sides; the number of new ones.

    Raises:
        ConfigError: when one is no picture.
    """
    _, height, width = plan.config.validation_shape
    tiling, patch_conv = plan.config.precache.vae_enable_tiling, plan.config.precache.vae_enable_patch_conv
    new = []
    for at, uri in enumerate(plan.config.validation.images):
        facts: dict[str, object] = {
            "content": content_digest(uri),
            "sides": [height, width],
            "checkpoint": plan.pretrained_identity,
        }
        facts |= {"tiling": True} if tiling else {}
        key, place = key_of(facts), layout.image_uri(plan.run_uri, at)
        if not storage.exists(place) or read_header(place)[1].get("key") != key:
            new.append((uri, key, place))
    vae = VideoAutoencoder(plan.pretrained, device, patch_conv=patch_conv, tiling=tiling) if new else None
    for uri, key, place in new:
        try:
            with storage.open_read(uri) as file:
                frames = decode_clip(
                    file,  # type: ignore[arg-type]
                    start=0.0,
                    end=None,
                    num_frames=1,
                    frame_rate=1.0,
                    height=height,
                    width=width,
                    crop="center",
                    crop_seed=0,
                )
        except VideoError as error:
            raise ConfigError("validation.images", uri, error.reason, "name pictures") from error
        assert vae is not None
        mean, _ = vae.encode(frames)
        storage.publish_bytes(place, safetensors.torch.save({"mean": mean}, metadata={"key": key}))
    return len(new)
