"""Timing of the text encoders alone: `python -m k5dist.benchmark.text --out FILE [--quick]`.

Qwen2.5-VL-7B and CLIP ViT-L of full size with random weights encode captions whose lengths are spread as people's are:
one caption after another, as a plain loop over the inference pipeline does it, and in batches of about one length, as
the precache does it. The features of both ways are held against each other (padding changes only bf16's rounding).

`--quick` on a CPU runs all of it with the tiny encoders; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from k5dist.compose import compose, to_run_config
from k5dist.console import console, say
from k5dist.model.encoders import TextEncoders, text_encoding, without_head
from k5dist.model.tiny import build_tiny_checkpoint

MAX_TOKENS = 256
MEDIAN_LENGTH, SPREAD = 90, 0.5  # of the captions, in the tiny tokenizer's tokens: about one a letter
Features = list[tuple[Tensor, Tensor]]


def make_captions(count: int, limit: int) -> list[str]:
    """Lengths are log-normal, as those of written and of generated captions are."""
    random = np.random.Generator(np.random.Philox(0))
    lengths = np.exp(np.log(MEDIAN_LENGTH) + SPREAD * random.standard_normal(count)).clip(8, limit).astype(int)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return ["".join(random.choice(letters, length)) for length in lengths]


def make_encoders(folder: Path, device: torch.device) -> TextEncoders:
    """The tiny flavour's, with real tokenizers; on a GPU with models of the real size in their place."""
    config = to_run_config(compose(["+flavour=t2v-tiny"]))
    build_tiny_checkpoint(folder, task="t2v", architecture=config.to_mapping()["model"])
    encoders = TextEncoders(str(folder), text_encoding(None, None, MAX_TOKENS), str(device))
    if device.type == "cuda":
        pipeline = encoders.pipeline
        pipeline.text_encoder = _qwen(device)
        pipeline.text_encoder_2 = _clip(device, pipeline.tokenizer_2)
    return encoders


def _qwen(device: torch.device) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    sizes: dict[str, Any] = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    sizes |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
    sizes["rope_parameters"] = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    return without_head(_on(device, lambda: Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=sizes))))


def _clip(device: torch.device, tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    sizes |= {"num_attention_heads": 12, "eos_token_id": tokenizer.eos_token_id}
    return _on(device, lambda: CLIPTextModel(CLIPTextConfig(**sizes)))


def _on(device: torch.device, make: Callable[[], Any]) -> Any:
    """Made where it will live: 7 billion random numbers take a CPU minutes."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def encode(encoders: TextEncoders, captions: Sequence[str], batch: int) -> Features:
    """In batches of neighbours by length, as the precache makes them; in the captions' own order."""
    order = sorted(range(len(captions)), key=lambda at: len(captions[at]))
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        found |= dict(zip(some, encoders.encode([captions[at] for at in some]), strict=True))
    return [found[at] for at in range(len(captions))]


def timed(device: torch.device, work: Callable[[], Features]) -> tuple[float, Features]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    features = work()
    return time.perf_counter() - start, features


def difference(found: Features, expected: Features) -> float:
    """Relative, over the features of all captions, both encoders'."""
    assert [a.shape for a, _ in found] == [a.shape for a, _ in expected], "padding must be cut off"
    off = sum(float((a - b).square().sum()) for mine, theirs in zip(found, expected, strict=True)
              for a, b in zip(mine, theirs, strict=True))  # fmt: skip
    return (off / sum(float(b.square().sum()) for theirs in expected for b in theirs)) ** 0.5


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m k5dist.benchmark.text", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--captions", type=int, default=512)
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--quick", action="store_true", help="few captions; on a CPU with tiny encoders")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.quick:
        parser.error("without a GPU only --quick runs, and its times mean nothing")
    captions = make_captions(16 if arguments.quick else arguments.captions, limit=MAX_TOKENS - 6)
    with tempfile.TemporaryDirectory() as folder:
        encoders = make_encoders(Path(folder), device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (tiny encoders: times mean nothing)"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "captions": len(captions), "rows": []}
    batches = [4] if arguments.quick else arguments.batches
    encode(encoders, captions[:8], 1)  # the first calls load kernels
    alone_seconds, alone = timed(device, lambda: encode(encoders, captions, 1))
    found["tokens"] = sum(len(qwen) for qwen, _ in alone)
    found["rows"].append({"batch": 1, "seconds": alone_seconds})
    for batch in batches:
        encode(encoders, captions[: 2 * batch], batch)
        seconds, features = timed(device, lambda b=batch: encode(encoders, captions, b))
        found["rows"].append({"batch": batch, "seconds": seconds, "difference": difference(features, alone)})
        say(f"{batch} at once: {1e3 * seconds / len(captions):.2f} ms a caption")
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    show(found)


def show(found: dict[str, Any]) -> None:
    table = Table(title=f"Text encoders on {found['device']}", title_justify="left", box=None)
    for name in ("batch", "ms a caption", "against one at a time", "difference"):
        table.add_column(name)
    alone = found["rows"][0]["seconds"]
    for row in found["rows"]:
        off = f"{row['difference']:.1e}" if "difference" in row else "–"
        each = 1e3 * row["seconds"] / found["captions"]
        table.add_row(str(row["batch"]), f"{each:.2f}", f"{alone / row['seconds']:.1f} ×", off)
    console.print(table)


if __name__ == "__main__":
    main()
