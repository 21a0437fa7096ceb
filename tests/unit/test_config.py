"""Composition and every rule of the configuration, met the way a user meets them: by overrides on the command line."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from k5dist import shapes
from k5dist.compose import compose, config_folder, flavours, to_run_config
from k5dist.config import ConfigError, RunConfig
from k5dist.schema import nearest

I2V_WITHOUT_REPOSITORY = ("i2v-lite-pretrain-5s", "i2v-pro-pretrain-5s")
NABLA = "+flavour=t2v-pro-sft-5s-hd"
I2V = "+flavour=i2v-tiny"
TEMPLATE = "precache.prompt_template"


def configure(*overrides: str) -> RunConfig:
    return to_run_config(compose(list(overrides)))


@functools.cache  # composing takes a twentieth of a second; two tests ask for each refusal
def refusal(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        configure(*overrides)
    return caught.value


# Overrides; the key, the value and a part of the rule that the error must name.
BROKEN: list[tuple[list[str], str, Any, str]] = [
    # One of a few names.
    (["flavour.task=v2v"], "flavour.task", "v2v", "t2v, i2v"),
    (["model.attention_type=dense"], "model.attention_type", "dense", "regular, nabla"),
    (["lora.targets=mlp"], "lora.targets", "mlp", "attention+ffn"),
    (["precache.latents=median"], "precache.latents", "median", "sample, mode"),
    (["train.precision=fp16"], "train.precision", "fp16", "bf16, fp32"),
    (
        ["train.activation_checkpointing=some"],
        "train.activation_checkpointing",
        "some",
        "auto, linear, attention, full",
    ),
    (["train.activation_checkpointing=true"], "train.activation_checkpointing", True, "text"),
    (["optimizer.kind=adamw8"], "optimizer.kind", "adamw8", "adamw, adamw_bf16"),
    (["optimizer.kind=prodigy"], "optimizer.lr", 1e-4, "belongs to 1"),
    (
        ["optimizer.kind=prodigy", "optimizer.lr=1", "optimizer.groups=[{match: a, lr_scale: 2}]"],
        "optimizer.groups",
        [{"match": "a", "lr_scale": 2}],
        "one step size",
    ),
    (
        ["optimizer.kind=adamw_schedulefree", "optimizer.schedule=cosine"],
        "optimizer.schedule",
        "cosine",
        "falling rate",
    ),
    (["optimizer.kind=adamw_schedulefree", "optimizer.betas=[0,0.9]"], "optimizer.betas", (0, 0.9), "0 < β1"),
    (["optimizer.kind=adamw_schedulefree", "ema.enabled=true"], "ema.enabled", True, "average already"),
    (["optimizer.muon_momentum=1"], "optimizer.muon_momentum", 1, "0 ≤ μ < 1"),
    (["optimizer.groups=[{match: '('}]"], "optimizer.groups[0].match", "(", "regular expression"),
    (["optimizer.groups=[{lr_scale: 1}]"], "optimizer.groups[0].match", None, "regular expression"),
    (["optimizer.groups=[{match: a, lr_scale: -1}]"], "optimizer.groups[0].lr_scale", -1, "0 or more"),
    (["optimizer.groups=[{match: a, lr: 1}]"], "optimizer.groups[0].lr", 1, "no such key"),
    (["train.timestep_sampling=normal"], "train.timestep_sampling", "normal", "logit_normal, uniform, mode, beta"),
    (["train.timestep_shift=auto"], "train.timestep_shift", "auto", "resolution"),
    (["train.timestep_mode_scale=2"], "train.timestep_mode_scale", 2, "ascend"),
    (["train.timestep_beta=[1]"], "train.timestep_beta", (1,), "two parameters"),
    (["train.timestep_beta=[1,0]"], "train.timestep_beta", (1, 0), "greater than 0"),
    (["train.timestep_shift_reference=[121,512]"], "train.timestep_shift_reference", (121, 512), "[frames, height"),
    (["train.unconditional=zeros"], "train.unconditional", "zeros", "empty, negative"),
    (["train.loss=l1"], "train.loss", "l1", "mse, huber"),
    (["train.loss_weighting=snr"], "train.loss_weighting", "snr", "none, min_snr, cosmap"),
    (["train.huber_c=0"], "train.huber_c", 0, "greater than 0"),
    (["train.min_snr_gamma=0"], "train.min_snr_gamma", 0, "greater than 0"),
    (["train.mask_background=1.5"], "train.mask_background", 1.5, "≤ 1"),
    (["data.mask_suffix=.mp4"], "data.mask_suffix", ".mp4", "two suffixes"),
    (["data.mask_suffix=.mask.txt"], "data.mask_suffix", ".mask.txt", "two suffixes"),
    (["optimizer.groups=[{match: cross_atention}]"], "optimizer.groups[0].match", "cross_atention", "no trained"),
    (["optimizer.groups=[{match: modulation}]"], "optimizer.groups[0].match", "modulation", "no trained"),
    (
        ["adapter=full", "optimizer.groups=[{match: lora_A}]"],
        "optimizer.groups[0].match",
        "lora_A",
        "no trained",
    ),
    (
        ["adapter=full", "optimizer.kind=muon", "optimizer.groups=[{match: attention|feed_forward, lr_scale: 0}]"],
        "optimizer.kind",
        "muon",
        "none of them is trained",
    ),
    (["validation.compare=[ema]"], "validation.compare", ["ema"], "no average"),
    (["adapter=full", "train.stream_weights=true"], "train.stream_weights", True, "trains them all"),
    (["ema.decay=1"], "ema.decay", 1, "stays a step"),
    (["ema.update_after=-1"], "ema.update_after", -1, "≥ 0"),
    (["ema.every=0"], "ema.every", 0, "greater than 0"),
    (["ema.device=cpu"], "ema.device", "cpu", "device, host"),
    (["optimizer.schedule=linear"], "optimizer.schedule", "linear", "constant, cosine"),
    (["cluster.kind=pbs"], "cluster.kind", "pbs", "slurm"),
    (["adapter=lora", "resume=always"], "resume", "always", "auto, never"),
    (["stages=[plan,trian]"], "stages", "trian", "precache"),
    (["stages=[]"], "stages", [], "at least one"),
    # Numbers that must be positive, or not negative.
    *(
        ([f"{key}={value}"], key, value, "greater than 0")
        for key, value in [
            *(("lora.rank", 0), ("lora.alpha", 0), ("data.frame_rate", 0)),
            *(("precache.shard_size_mib", 0), ("precache.text_batch_size", -1), ("precache.max_text_tokens", 0)),
            *(("train.steps", 0), ("train.batch_size", 0), ("train.timestep_std", 0), ("train.timestep_shift", 0)),
            *(("optimizer.lr", 0), ("optimizer.max_grad_norm", -1)),
            *(("parallel.shard", 0), ("parallel.replicate", 0), ("parallel.context", 0)),
            *(("cluster.nodes", 0), ("cluster.workers_per_node", 0)),
            *(("validation.sampling_steps", 0), ("validation.timesteps", 0)),
            *(("checkpoint.every", 0), ("checkpoint.keep", 0)),
        ]
    ),
    (["optimizer.warmup_steps=-1"], "optimizer.warmup_steps", -1, "≥ 0"),
    (["cluster.gpus_per_node=-1"], "cluster.gpus_per_node", -1, "≥ 0"),
    (["cluster.max_restarts=-1"], "cluster.max_restarts", -1, "≥ 0"),
    (["validation.every=-1"], "validation.every", -1, "≥ 0"),
    (["validation.guidance=0.5"], "validation.guidance", 0.5, "≥ 1"),
    (["optimizer.kind=adafactor", "optimizer.lr=1e-4"], "optimizer.lr", 1e-4, "root mean square, 0.001 or more"),
    # Shares and probabilities.
    (["data.held_out=1"], "data.held_out", 1, "< 1"),
    (["data.held_out=-0.1"], "data.held_out", -0.1, "0 ≤"),
    (["precache.max_failure_ratio=1.5"], "precache.max_failure_ratio", 1.5, "≤ 1"),
    (["train.caption_dropout=2"], "train.caption_dropout", 2, "≤ 1"),
    (["optimizer.betas=[0.9]"], "optimizer.betas", (0.9,), "two numbers"),
    (["optimizer.betas=[0.9,1.0]"], "optimizer.betas", (0.9, 1.0), "β < 1"),
    # Frames and sides.
    (["data.num_frames=60"], "data.num_frames", 60, "4k + 1"),
    (["data.num_frames=0"], "data.num_frames", 0, "4k + 1"),
    (["validation.num_frames=12"], "validation.num_frames", 12, "4k + 1"),
    (["data.resolution=[500,768]"], "data.resolution", [500, 768], "multiples of 16"),
    (["data.resolution=512x770"], "data.resolution", [512, 770], "multiples of 16"),
    (["data.resolution=[0,768]"], "data.resolution", [0, 768], "multiples of 16"),
    (["data.resolution=[512]"], "data.resolution", (512,), "preset: sd, hd"),
    (["data.resolution=fullhd"], "data.resolution", "fullhd", "preset: sd, hd"),
    (["validation.resolution=[512,100]"], "validation.resolution", [512, 100], "multiples of 16"),
    ([NABLA, "data.resolution=[512,784]"], "data.resolution", [512, 784], "multiples of 128"),
    ([NABLA, "validation.resolution=[528,768]"], "validation.resolution", [528, 768], "multiples of 128"),
    ([I2V, "validation.num_frames=13"], "validation.num_frames", 13, "at least 17"),
    # Keys that belong together.
    (["precache.prompt_template_start=3"], "precache.prompt_template_start", 3, "belong together"),
    ([f"{TEMPLATE}='a {{}}'"], "precache.prompt_template_start", None, "belong together"),
    ([f"{TEMPLATE}=nothing", "precache.prompt_template_start=3"], TEMPLATE, "nothing", "{}"),
    (["parallel.context=8"], "parallel.context", 8, "28 heads"),
    *(([f"+flavour={name}"], "pretrained", None, name) for name in I2V_WITHOUT_REPOSITORY),
    # Types.
    (["train.steps=many"], "train.steps", "many", "a whole number"),
    (["train.steps=1.5"], "train.steps", 1.5, "a whole number"),
    (["train.steps=true"], "train.steps", True, "a whole number"),
    (["train.batch_size=2.0"], "train.batch_size", 2.0, "a whole number or null"),
    (["train.compile=1"], "train.compile", 1, "true or false"),
    (["optimizer.lr=null"], "optimizer.lr", None, "a number"),
    (["optimizer.lr=small"], "optimizer.lr", "small", "a number"),
    (["optimizer.betas=[0.9,b]"], "optimizer.betas[1]", "b", "a number"),
    (["storage.root=[a]"], "storage.root", ["a"], "text"),
    (["stages=plan"], "stages", "plan", "a list"),
    (["train=3"], "train", 3, "a group of keys"),
    (["~train.steps"], "train.steps", None, "missing"),
]


@pytest.mark.parametrize(("overrides", "key", "value", "rule"), BROKEN, ids=[" ".join(broken) for broken, *_ in BROKEN])
def test_a_broken_rule_is_named(overrides: list[str], key: str, value: Any, rule: str) -> None:
    error = refusal(*overrides)
    assert (error.key, error.value) == (key, value)
    assert rule in error.rule
    lines = error.block().splitlines()
    assert lines[0] == "Configuration error"
    assert [line.split()[0] for line in lines[1:]] == ["key", "value", "rule", "fix"]
    assert all(len(line.split()) > 1 for line in lines[1:])
    assert key in lines[1]
    assert repr(error.value) in lines[2]


@pytest.mark.parametrize(
    "overrides",
    [broken for broken, *_ in BROKEN],
    ids=" ".join,
)
def test_the_proposed_fix_works(overrides: list[str]) -> None:
    """Where a fix reads `key=value`, typing it after the broken override mends that key."""
    error = refusal(*overrides)
    for fix in error.fix.split(" or "):
        if re.fullmatch(r"[\w.]+=[^ <]+", fix):
            configure(*overrides, fix)


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_are_finite(value: str) -> None:
    assert refusal(f"optimizer.lr={value}").key == "optimizer.lr"


@pytest.mark.parametrize("name", [".", "..", "../elsewhere", "/elsewhere", "a/../../b"])
def test_a_run_never_leaves_its_folder(name: str) -> None:
    """`resume=never` empties runs/<name>: a name that leads out of it would empty something else."""
    assert refusal(f"name='{name}'").key == "name"


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("data.sorce=x", "data.source"),
        ("+data.sorce=x", "data.source"),
        ("trian.steps=3", "train.steps"),
        ("+trian.steps=3", "train"),
        ("train.step=3", "train.steps"),
        ("stage=[plan]", "stages"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, near: str) -> None:
    error = refusal(override)
    assert error.key.split(".")[0] == override.strip("+").split("=")[0].split(".")[0]
    assert error.rule.startswith("no such key")
    assert near in re.split(r"[ ,?]+", error.fix)


def test_an_unknown_key_shows_the_value_that_was_given() -> None:
    assert refusal("data.sorce=x").value == "x"


@pytest.mark.parametrize(
    ("name", "near"),
    [("t2v-lite-sft-5", "t2v-lite-sft-5s"), ("t2v-tny", "t2v-tiny"), ("T2V-pro-sft-10s", "t2v-pro-sft-10s-hd")],
)
@pytest.mark.parametrize("sign", ["", "+"])
def test_an_unknown_flavour_names_the_nearest(sign: str, name: str, near: str) -> None:
    error = refusal(f"{sign}flavour={name}")
    assert (error.key, error.value) == ("flavour", name)
    assert near in error.fix


@pytest.mark.parametrize(
    ("override", "near"), [("cluster=slrum", "slurm"), ("adapter=ful", "full"), ("data=clip", "clips")]
)
def test_an_unknown_choice_names_the_nearest(override: str, near: str) -> None:
    error = refusal(override)
    assert error.key == override.split("=", maxsplit=1)[0]
    assert near in re.split(r"[ ,?]+", error.fix)


@pytest.mark.parametrize("overrides", [["train.steps=[1"], ["+flavour=t2v-tiny", "+flavour=i2v-tiny"]])
def test_what_hydra_refuses_is_a_configuration_error(overrides: list[str]) -> None:
    error = refusal(*overrides)
    assert error.rule
    assert error.fix
    assert configure().flavour.name == "t2v-lite-sft-5s"  # and the next composition is none the worse


def test_the_command_line_prints_a_block_and_no_traceback() -> None:
    command = [sys.executable, "-m", "k5dist.launch", "trian.steps=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Configuration error")
    assert "train.steps" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_flavour_it_is_the_default() -> None:
    assert configure().flavour.name == "t2v-lite-sft-5s"


@pytest.mark.parametrize("name", flavours())
def test_every_flavour_composes_and_comes_back_from_plain_json(name: str) -> None:
    missing = ["pretrained=some/repository"] if name in I2V_WITHOUT_REPOSITORY else []
    config = configure(f"flavour={name}", *missing)
    assert config.flavour.name == name
    assert config.flavour.task == name[:3]
    assert RunConfig.from_mapping(json.loads(json.dumps(config.to_mapping()))) == config


@pytest.mark.parametrize("degree", [1, 2, 4, 7, 14, 28])
def test_ulysses_takes_the_divisors_of_the_heads(degree: int) -> None:
    assert configure(f"parallel.context={degree}").parallel.context == degree
    assert configure(NABLA, "parallel.context=8").model.num_heads == 32


def test_a_full_fine_tune_has_its_own_learning_rate() -> None:
    lora, full = configure(), configure("adapter=full")
    assert (lora.adapter, full.adapter) == ("lora", "full")
    assert full.optimizer.lr < lora.optimizer.lr
    assert configure("adapter=full", "optimizer.lr=3e-5").optimizer.lr == 3e-5


@pytest.mark.parametrize("kind", ["local", "ray", "slurm", "kubernetes"])
def test_every_cluster_composes(kind: str) -> None:
    assert configure(f"cluster={kind}").cluster.kind == kind


def test_a_resolution_is_sides_or_a_preset() -> None:
    assert configure("data.resolution=[512,768]").resolutions == ((512, 768),)
    assert configure("data.resolution=512x768").resolutions == ((512, 768),)
    assert configure("data.resolution=sd").resolutions == shapes.SD_RESOLUTIONS
    assert configure("data.resolution=hd").resolutions == shapes.HD_RESOLUTIONS


def test_validation_takes_the_flavours_shape_unless_told() -> None:
    assert configure().validation_shape == (121, 512, 768)
    assert configure(NABLA).validation_shape == (121, 768, 1280)
    assert configure("data.resolution=[512,512]").validation_shape == (121, 512, 512)
    told = configure("validation.num_frames=61", "validation.resolution=[256,384]")
    assert told.validation_shape == (61, 256, 384)


def test_nearest_is_best_first() -> None:
    assert nearest("train.step", ["train.steps", "train.seed", "storage.root"])[0] == "train.steps"
    assert nearest("zzz", ["train.steps"]) == []


def leaf_keys(node: Any, path: str = "") -> set[str]:
    if not isinstance(node, dict):
        return {path[:-1]}
    return {key for name, child in node.items() for key in leaf_keys(child, f"{path}{name}.")}


def commented_keys(file: Path, package: str = "") -> set[str]:
    """Leaf keys of a YAML file that have a comment on their line, or on the line above."""
    lines = file.read_text().splitlines()

    def walk(node: yaml.Node, path: str) -> set[str]:
        keys: set[str] = set()
        assert isinstance(node, yaml.MappingNode)
        for name, child in node.value:
            line = name.start_mark.line
            if isinstance(child, yaml.MappingNode):
                keys |= walk(child, f"{path}{name.value}.")
            elif re.search(r"\s# \S", lines[line]) or (line and re.match(r"\s*# \S", lines[line - 1])):
                keys.add(f"{path}{name.value}")
        return keys

    root = yaml.compose(file.read_text())
    assert root is not None
    return walk(root, package)


def test_every_key_says_what_it_means() -> None:
    """conf/ is the one place of defaults, units and meanings. (`model` repeats the checkpoint's own config.json.)"""
    conf = config_folder()
    said = commented_keys(conf / "config.yaml") | commented_keys(conf / "adapter" / "lora.yaml")
    said |= commented_keys(conf / "data" / "clips.yaml", "data.")
    said |= commented_keys(conf / "cluster" / "local.yaml", "cluster.")
    keys = {key for key in leaf_keys(OmegaConf.to_container(compose([]))) if not key.startswith("model.")}
    assert sorted(keys - said) == []


@pytest.mark.parametrize("key", ["tracking.uri", "storage.root", "data.source", "pretrained"])
def test_a_login_in_a_uri_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_run_config(compose(["+flavour=t2v-tiny", f"{key}='https://me:hunter2@host/x'"]))
    assert caught.value.key == key
    assert "hunter2" not in caught.value.block() + str(caught.value)
