"""A whole Kandinsky 5 checkpoint of 0.7 M random parameters: the tests' and the CPU tour's pretrained model.

Nothing is downloaded, yet every file is written by the real classes, so loading it takes the same paths as loading the
real one. Random weights alone would not do: a fresh transformer ignores its prompt, a fresh VAE gives latents of any
scale, and an untrained tokenizer does not fit the pipeline's crop. The builders below mend these.
"""

import contextlib
import difflib
import inspect
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from k5dist.model.pretrained import VISION_FOLDER

# T2V and I2V checkpoints differ in the pipeline that reads them and in the shift of their sampling schedule.
_PIPELINES = {"t2v": "Kandinsky5T2VPipeline", "i2v": "Kandinsky5I2VPipeline"}
_SHIFTS = {"t2v": 10.0, "i2v": 5.0}

_REQUIRED = ("model_dim", "ff_dim", "time_dim", "num_text_blocks", "num_visual_blocks", "axes_dims")
_REQUIRED += ("in_text_dim", "in_text_dim2", "attention_type")
_OPTIONAL = ("attention_P", "attention_wT", "attention_wW", "attention_wH", "attention_add_sta", "attention_method")
# Every Kandinsky 5 video model has these; a whole transformer config may be passed as it stands.
_FIXED: dict[str, Any] = {"in_visual_dim": 16, "out_visual_dim": 16, "visual_cond": True, "patch_size": (1, 2, 2)}

_TEXT_HEAD_DIM = 16  # attention heads of both text encoders
_MAX_QWEN_TOKENS = 32768
_QWEN_SPECIALS = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_CLIP_WORD_END = "</w>"  # CLIP marks the last piece of a word

_LETTERS = sorted(ByteLevel.alphabet())  # one for each of the 256 bytes
_Merges: TypeAlias = Any  # list[tuple[str, str]], which the tokenizers take and their annotations do not know

_MODULATION_STD = 0.05
_LOGVAR_MEAN, _LOGVAR_STD = -6.0, 0.5  # a posterior of width 0.05: narrow, yet a drawn sample differs from the mean
_PIXEL_STD = 0.4  # decoded noise fills [-1, 1] with few pixels clipped


def build_tiny_checkpoint(folder: Path, *, task: str, architecture: Mapping[str, Any], seed: int = 0) -> None:
    """Write a whole diffusers-format Kandinsky 5 checkpoint with real classes and random weights into `folder`.

    Equal arguments give equal bytes in every file, and the caller's random state is left as it was. A component's
    weights follow from the seed and its own sizes alone, so architectures of the same text widths share VAE and text
    encoders bit for bit. `model_index.json` is written last: a folder that has one is complete.

    Args:
        folder: made if need be; files of an earlier build are overwritten.
        task: "t2v" or "i2v".
        architecture: the transformer's config under diffusers' names. Qwen gets `in_text_dim` as its hidden size,
            CLIP `in_text_dim2`.
        seed: of all weights.

    Raises:
        ValueError: the task or the architecture cannot be built; the message names the key and the fix.
    """
    if task not in _PIPELINES:
        raise ValueError(f"task={task!r}: must be one of {', '.join(_PIPELINES)}")
    config = _transformer_config(architecture)
    pipeline_class = getattr(diffusers, _PIPELINES[task])
    # The template and its crop differ between diffusers releases; only an instance knows them.
    bare = pipeline_class(**dict.fromkeys(inspect.signature(pipeline_class).parameters))
    head = bare.prompt_template.partition("{}")[0]

    qwen_tokenizer = _build_qwen_tokenizer(head, bare.prompt_template_encode_start_idx)
    clip_tokenizer = _build_clip_tokenizer(head)
    with _random_state(seed, "transformer"):
        transformer = _build_transformer(config)
    with _random_state(seed, "vae"):
        vae = _build_vae()
    with _random_state(seed, "text_encoder"):
        text_encoder = _build_qwen(config["in_text_dim"], qwen_tokenizer)
    with _random_state(seed, "text_encoder_2"):
        text_encoder_2 = _build_clip(config["in_text_dim2"], clip_tokenizer)

    with _random_state(seed, "vision"):
        _build_vision().save_pretrained(folder / VISION_FOLDER, safe_serialization=True)

    components: dict[str, Any] = {
        **{"transformer": transformer, "vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2},
        # A real checkpoint has a Qwen2VLProcessor here, whose image half needs torchvision. Prompts are text only, and
        # the bare tokenizer takes the pipeline's calls, their `images=None, videos=None` included.
        "tokenizer": qwen_tokenizer,
        "tokenizer_2": clip_tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=_SHIFTS[task]),
    }
    pipeline_class(**components).save_pretrained(folder, safe_serialization=True)


def _transformer_config(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The checked keyword arguments of the transformer's class."""
    known = (*_REQUIRED, *_OPTIONAL, *_FIXED)
    for key in architecture:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"architecture.{key}: unknown key; {f'did you mean {near[0]}?' if near else 'remove it'}")
    for key in _REQUIRED:
        if architecture.get(key) is None:
            raise ValueError(f"architecture.{key} is missing; the transformer's config.json has it")
    config = {**_FIXED, **architecture}
    config["axes_dims"] = tuple(config["axes_dims"])
    config["patch_size"] = tuple(config["patch_size"])
    for key, value in _FIXED.items():
        if config[key] != value:
            raise ValueError(f"architecture.{key}={config[key]!r}: every video model has {value!r}; leave it out")
    head_dim = sum(config["axes_dims"])
    if config["model_dim"] % head_dim or any(dim % 2 for dim in config["axes_dims"]):
        raise ValueError(
            f"architecture.model_dim={config['model_dim']}: must be a multiple of the head size {head_dim}, the sum of"
            f" the (even) axes_dims {config['axes_dims']}; use e.g. {2 * head_dim}"
        )
    for key in ("in_text_dim", "in_text_dim2"):
        if config[key] <= 0 or config[key] % _TEXT_HEAD_DIM:
            raise ValueError(f"architecture.{key}={config[key]}: must be a multiple of {_TEXT_HEAD_DIM}; use e.g. 64")
    return config


@contextlib.contextmanager
def _random_state(seed: int, name: str) -> Iterator[None]:
    """Lend the libraries' initialisers, which know only the global CPU generator, a state of their own.

    Not `torch.manual_seed`: it would also seed the accelerators, whose state is not put back here.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        yield


def _build_transformer(config: Mapping[str, Any]) -> Kandinsky5Transformer3DModel:
    transformer = Kandinsky5Transformer3DModel(**config)
    for name, parameter in transformer.named_parameters():
        # Zero as the class leaves it, every gate is shut: neither prompt nor blocks would reach the output.
        if "modulation" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter, std=_MODULATION_STD)
    return transformer


@torch.no_grad()
def _build_vae() -> AutoencoderKLHunyuanVideo:
    """A VAE whose scaled latents have zero mean and unit variance a channel on clips in [-1, 1]."""
    sizes: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    vae: Any = AutoencoderKLHunyuanVideo(**sizes).eval()
    for name, parameter in vae.named_parameters():
        # Random biases outweigh the picture after a few layers of random weights.
        if name.endswith("bias"):
            parameter.zero_()
    clips = _natural_clips()
    channels = vae.config["latent_channels"]
    # The posterior's 2C channels: C means, then C log-variances.
    mean = torch.tensor([0.0, _LOGVAR_MEAN]).repeat_interleave(channels)
    std = torch.tensor([1 / vae.config["scaling_factor"], _LOGVAR_STD]).repeat_interleave(channels)
    _standardise(vae.quant_conv, vae.encode(clips).latent_dist.parameters, mean=mean, std=std)
    pixels = vae.decode(vae.encode(clips).latent_dist.mean).sample
    _standardise(vae.decoder.conv_out.conv, pixels, mean=torch.zeros(3), std=torch.full((3,), _PIXEL_STD))
    return vae


def _natural_clips() -> torch.Tensor:
    """Two moving synthetic clips with the falling spectrum of natural pictures, [2, 3, 17, 64, 96] in [-1, 1]."""
    clips = torch.zeros(2, 3, 17, 64, 96)
    for side in (2, 4, 8, 16, 32):
        noise = torch.randn(2, 3, 5, side, side * 3 // 2)
        clips += torch.nn.functional.interpolate(noise, size=clips.shape[2:], mode="trilinear") / side**0.7
    return (0.5 * clips / clips.std()).clamp(-1, 1)


def _standardise(conv: torch.nn.Conv3d, output: torch.Tensor, *, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Rescale a last convolution [C out] that gave `output` [B, C, T, H, W] to the wanted moments, [C] each."""
    assert conv.bias is not None
    # Rounded, so that the last bits of a convolution, which vary with the number of threads, do not reach the weights.
    had_mean = output.mean((0, 2, 3, 4)).round(decimals=3)
    had_std = output.std((0, 2, 3, 4)).round(decimals=3)
    scale = std / had_std
    conv.weight.mul_(scale.view(-1, 1, 1, 1, 1))
    conv.bias.sub_(had_mean).mul_(scale).add_(mean)


def _build_qwen(hidden: int, tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    token: Any = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            **{"vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": 2 * hidden},
            "num_hidden_layers": 2,
            "num_attention_heads": hidden // _TEXT_HEAD_DIM,
            "num_key_value_heads": hidden // _TEXT_HEAD_DIM,
            "max_position_embeddings": _MAX_QWEN_TOKENS,
            "initializer_range": hidden**-0.5,  # large enough that a token's state feels the words before it
            # The shares of time, height and width in half a head, as 16, 24, 24 are in the real one's.
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            **_token_ids(tokenizer, "eos", "pad"),
            "bos_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            **{"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [0]},
            "out_hidden_size": hidden,
        },
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _build_clip(hidden: int, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        projection_dim=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=hidden // _TEXT_HEAD_DIM,
        max_position_embeddings=tokenizer.model_max_length,
        initializer_factor=4.0,  # large enough that the pooled state of the last token feels the words before it
        **_token_ids(tokenizer, "bos", "eos", "pad"),  # the pooled position is found by the end token
    )
    return CLIPTextModel(config).eval()


def _build_vision() -> Dinov2Model:
    """DINOv2 of 16 patches a square frame of 56 pixels; large weights, so that features tell pictures apart."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    return Dinov2Model(Dinov2Config(**sizes, image_size=56, patch_size=14, initializer_range=0.2)).eval()


def _token_ids(tokenizer: Qwen2Tokenizer | CLIPTokenizer, *names: str) -> dict[str, Any]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}


def _build_qwen_tokenizer(head: str, crop: int) -> Qwen2Tokenizer:
    """A byte-level tokenizer that reads the template's `head` as exactly `crop` tokens.

    The pipeline drops that many tokens in front: with any other count, words of the prompt would go or the template
    would stay. Each word of the head is first learnt as one token, then merges are given up until the count is right.
    """
    merges = _train_merges(head, Qwen2Tokenizer().backend_tokenizer)
    options: dict[str, Any] = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": list(_QWEN_SPECIALS),
        # The pipeline calls the text encoder without a mask: padding in front would be read as part of the prompt.
        "padding_side": "right",
        "model_max_length": _MAX_QWEN_TOKENS,
    }

    def build(merges: _Merges) -> Qwen2Tokenizer:
        return Qwen2Tokenizer(vocab=_vocabulary(_LETTERS, merges), merges=merges, **options)

    tokenizer = build(merges)
    count = len(tokenizer(head)["input_ids"])
    for position in reversed(range(len(merges))):
        if count >= crop:
            break
        # What a kept merge is made of must stay; and a word that occurs often may cost more tokens than are wanted.
        if any("".join(merges[position]) in parts for parts in merges):
            continue
        fewer = merges[:position] + merges[position + 1 :]
        candidate = build(fewer)
        longer = len(candidate(head)["input_ids"])
        if longer <= crop:
            tokenizer, merges, count = candidate, fewer, longer
    if count != crop:
        raise RuntimeError(f"the prompt template's head has {count} tokens and its crop is {crop}: no tokenizer fits")
    return tokenizer


def _build_clip_tokenizer(text: str) -> CLIPTokenizer:
    """CLIP's tokenizer with its own special tokens; words that are not in `text` fall into letters and syllables."""
    merges = _train_merges(text, CLIPTokenizer().backend_tokenizer, word_end=_CLIP_WORD_END)
    vocabulary = _vocabulary([*_LETTERS, *(letter + _CLIP_WORD_END for letter in _LETTERS)], merges)
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _train_merges(text: str, like: Tokenizer, *, word_end: str = "") -> _Merges:
    """Byte-pair merges that make each word of `text` one token, words being cut as the tokenizer `like` cuts them."""
    backend = Tokenizer(BPE())
    backend.normalizer, backend.pre_tokenizer = like.normalizer, like.pre_tokenizer
    # Letters that end a word are told beforehand: met on the way, they are numbered by chance, and ties go by number.
    endings = [letter + word_end for letter in _LETTERS] if word_end else []
    options: dict[str, Any] = {"end_of_word_suffix": word_end, "special_tokens": endings}
    backend.train_from_iterator([text], BpeTrainer(vocab_size=10_000, show_progress=False, **options))
    # The library tells the merges only in its serialised form.
    return [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]


def _vocabulary(symbols: list[str], merges: _Merges) -> dict[str, int]:
    tokens = dict.fromkeys([*symbols, *("".join(merge) for merge in merges)])
    return {token: index for index, token in enumerate(tokens)}
