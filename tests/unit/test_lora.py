"""Adapters: which layers, how scaled, dropout and DoRA against plain references, starts from LoRAs, quantised bases."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import Kandinsky5T2VPipeline
from peft import get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from k5dist.compose import compose, to_run_config
from k5dist.config import ConfigError, LoraConfig, Route
from k5dist.estimate import Recompute
from k5dist.model import lora_files
from k5dist.model.dit import VideoTransformer, VisualBlock
from k5dist.model.forward import predict_velocity
from k5dist.model.lora import DropoutKey, KeyedDropout, dropout_key, peft_config, row_norms
from k5dist.model.quantised import QuantisedLinear, dequantise, quantise, quantised_layers, round_blocks
from k5dist.model.transformer import adapters_off
from k5dist.model.tread import Routing
from k5dist.plan import ClusterFacts, make_plan
from k5dist.train.parallelise import compile_blocks, set_recompute
from tests.unit.models import CPU, lora_config, model_config, our_model, random, random_text, relative, set_adapters

FP32, BF16 = torch.float32, torch.bfloat16
ATTENTION_TO_SELF = "visual_transformer_blocks.0.self_attention"


def adapted(transformer: nn.Module) -> set[str]:
    return {name.partition(".lora_")[0] for name, _ in transformer.named_parameters() if ".lora_" in name}


def velocity(transformer: nn.Module, folder: Path) -> Tensor:
    arguments: Any = (random(1, 2, 8, 12, 16), False, torch.tensor([500.0]), random_text(4))
    return predict_velocity(transformer, model_config(folder), *arguments)


# Targets and scale


def test_a_list_of_targets_hits_the_blocks_alone(tiny_t2v: Path) -> None:
    model = model_config(tiny_t2v)
    lora = lora_config(4, 4.0, ("cross_attention.to_query", "feed_forward.in_layer"), blocks="visual")
    blocks = [f"visual_transformer_blocks.{i}" for i in range(model.num_visual_blocks)]
    wanted = {f"{b}.{layer}" for b in blocks for layer in ("cross_attention.to_query", "feed_forward.in_layer")}
    assert adapted(our_model(tiny_t2v, lora)) == wanted
    by_end = adapted(our_model(tiny_t2v, lora_config(4, 4.0, ("out_layer",))))
    layers = {name.split(".", 2)[2] for name in by_end}
    assert layers == {f"{part}.out_layer" for part in ("self_attention", "cross_attention", "feed_forward")}
    assert len(by_end) == 3 * model.num_visual_blocks + 2 * model.num_text_blocks


@pytest.mark.parametrize(
    ("overrides", "key", "fix"),
    [
        (["lora.targets=[to_qery]"], "lora.targets", "to_query"),
        (["lora.targets=[cross_attention.to_query]", "lora.blocks=text"], "lora.targets", "cross_attention.to_query"),
        (["lora.targets=[]"], "lora.targets", "attention"),
        (["lora.blocks=vision"], "lora.blocks", "visual"),
        (["lora.dropout=1"], "lora.dropout", "lora.dropout=0.05"),
        (["lora.base_dtype=int4"], "lora.base_dtype", "int8"),
        (["adapter=full", "lora.base_dtype=int8"], "lora.base_dtype", "adapter=lora"),
        (["adapter=full", "lora.init_from=/some/lora"], "lora.init_from", "adapter=lora"),
        (["adapter=full", "lora.use_dora=true"], "lora.use_dora", "lora.use_dora=false"),
        (["adapter=full", "export.merge=true"], "export.merge", "adapter=lora"),
        (["lora.base_dtype=int8", "train.float8=true", "train.precision=bf16"], "lora.base_dtype", "one of"),
    ],
)
def test_bad_settings_are_refused(overrides: list[str], key: str, fix: str) -> None:
    with pytest.raises(ConfigError) as error:
        to_run_config(compose(["+flavour=t2v-tiny", *overrides]))
    assert error.value.key == key
    assert fix in error.value.fix


def test_float8_is_planned_where_the_gpu_has_it() -> None:
    config = to_run_config(compose(["+flavour=t2v-lite-sft-5s", "lora.base_dtype=float8"]))
    make_plan(config, ClusterFacts(1, "NVIDIA H100 80GB HBM3"), "weights")
    with pytest.raises(ConfigError) as error:
        make_plan(config, ClusterFacts(1, "NVIDIA A100-SXM4-80GB"), "weights")
    assert (error.value.key, error.value.fix) == ("lora.base_dtype", "lora.base_dtype=int8")


def test_a_run_keeps_its_fingerprint_where_no_option_is_used() -> None:
    """What is off is not in it; a LoRA to start from is in it by its content, wherever it lies."""

    def fingerprint(*overrides: str, lora_identity: str = "") -> str:
        config = to_run_config(compose(["+flavour=t2v-tiny", *overrides]))
        return make_plan(config, ClusterFacts(0), "weights", lora_identity=lora_identity).run_fingerprint

    assert fingerprint() == fingerprint("lora.dropout=0", "lora.use_dora=false")
    options = ["dropout=0.1", "use_dora=true", "use_rslora=true", "base_dtype=int8", "blocks=visual"]
    found = {fingerprint(f"lora.{option}") for option in options}
    assert len(found | {fingerprint()}) == 6
    here, there = (fingerprint(f"lora.init_from={place}", lora_identity="lora:1") for place in ("/a", "s3://b/c"))
    assert here == there != fingerprint("lora.init_from=/a", lora_identity="lora:2")
    listed = [fingerprint(f"lora.targets=[{names}]") for names in ("to_query,to_key", "to_key,to_query", "to_key")]
    assert listed[0] == listed[1] != listed[2]


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_the_scale_is_pefts(tiny_t2v: Path, rslora: bool, scale: float) -> None:
    lora = lora_config(4, 8.0, "attention", use_rslora=rslora)
    layer: Any = our_model(tiny_t2v, lora).get_submodule(f"{ATTENTION_TO_SELF}.to_query")
    assert lora.scale == layer.scaling["default"] == scale


# Dropout


def test_dropout_drops_its_share_and_is_a_function_of_its_key() -> None:
    key, x = DropoutKey(), torch.ones(1, 512, 256)
    layers = [KeyedDropout(0.3, f"visual_transformer_blocks.{i}.self_attention.to_query", key) for i in range(2)]
    key.set(1, CPU)
    first, again, other = layers[0](x), layers[0](x), layers[1](x)
    key.set(2, CPU)
    next_ = layers[0](x)
    assert torch.equal(first, again)
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    kept = [(out[0] > 0).double() for out in (first, other, next_)]
    for out in kept:
        assert abs(out.mean() - 0.7) < 0.005  # 4 deviations of 131,072 draws
        assert (out.mean(0) - 0.7).abs().max() < 0.1 and (out.mean(1) - 0.7).abs().max() < 0.15
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert abs(((kept[a] - 0.7) * (kept[b] - 0.7)).mean()) < 0.003, "independent"
    neighbours = (kept[0][:, 1:] - 0.7) * (kept[0][:, :-1] - 0.7), (kept[0][1:] - 0.7) * (kept[0][:-1] - 0.7)
    assert all(abs(product.mean()) < 0.003 for product in neighbours)
    layers[0].eval()
    assert torch.equal(layers[0](x), x)


def test_workers_that_share_a_clip_drop_what_one_would() -> None:
    key = DropoutKey()
    key.set(5, CPU)
    x = random(1, 24, 16)
    path = "visual_transformer_blocks.1.cross_attention"
    whole, half = KeyedDropout(0.5, f"{path}.to_query", key), KeyedDropout(0.5, f"{path}.to_query", key)
    half.context_rank = 1
    assert torch.equal(half(x[:, 12:]), whole(x)[:, 12:])
    assert not KeyedDropout(0.5, f"{path}.to_key", key).shares_tokens, "the text is whole everywhere"


@pytest.mark.parametrize(
    ("recompute", "options"),
    [
        ("full", {}),
        ("attention", {}),
        ("linear", {}),
        ("attention", {"base_dtype": "int8"}),
        ("linear", {"base_dtype": "float8", "use_dora": True}),
    ],
    ids=["full", "attention", "linear", "attention-int8", "linear-float8-dora"],
)
def test_recomputed_blocks_do_and_drop_the_same(tiny_t2v: Path, recompute: str, options: dict[str, Any]) -> None:
    gradients = []
    for policy in ("none", recompute):
        transformer = our_model(tiny_t2v, lora_config(4, 4.0, "attention+ffn", dropout=0.5, **options)).train()
        set_adapters(transformer)
        for module in transformer.modules():
            if isinstance(module, VisualBlock):
                module.recompute = policy
        key = dropout_key(transformer)
        assert key is not None
        key.set(3, CPU)
        velocity(transformer, tiny_t2v).square().mean().backward()
        gradients.append([p.grad for p in transformer.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]


def test_compiled_blocks_are_one_graph_whatever_is_dropped(tiny_t2v: Path) -> None:
    lora = lora_config(4, 4.0, "attention+ffn", dropout=0.5, use_dora=True, base_dtype="int8")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager, compiled = (our_model(tiny_t2v, lora).train() for _ in range(2))
    assert isinstance(compiled, VideoTransformer)
    for transformer in (eager, compiled):
        set_adapters(transformer)
    set_recompute(compiled, Recompute(0, len(compiled.visual_transformer_blocks)))
    compile_blocks(compiled, backend=counter)
    for number in (3, 4):
        results = []
        for transformer in (eager, compiled):
            key = dropout_key(transformer)
            assert key is not None
            key.set(number, CPU)
            out = velocity(transformer, tiny_t2v)
            trained = [p for p in transformer.parameters() if p.requires_grad]
            results.append([out.detach(), *torch.autograd.grad(out.square().mean(), trained)])
        assert relative(results[1][0], results[0][0]) < 1e-5
        # RoPE passes gradients on through bf16, where a last bit of fp32 now and then turns a rounding.
        assert all(relative(ours, theirs) < 2e-3 for ours, theirs in zip(*results, strict=True))
    assert counter.frame_count == 2 < len(compiled.visual_transformer_blocks), "the first's input asks for no gradient"


# DoRA


def test_dora_is_the_published_formula(tiny_t2v: Path) -> None:
    lora = lora_config(4, 8.0, "attention", use_dora=True)
    transformer = our_model(tiny_t2v, lora)
    base = velocity(our_model(tiny_t2v), tiny_t2v)
    assert relative(velocity(transformer, tiny_t2v), base) < 1e-4, "lengths begin as the rows'"
    set_adapters(transformer)
    layer: Any = transformer.get_submodule(f"{ATTENTION_TO_SELF}.to_query")
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    length = layer.lora_magnitude_vector["default"].weight
    moved = weight + 2.0 * second @ first
    direction = moved / moved.detach().norm(dim=1, keepdim=True)
    x = random(1, 5, weight.shape[1])
    expected = x @ (length[:, None] * direction).T + bias
    out = layer(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(row_norms(weight, first, second, 2.0), moved.norm(dim=1))
    goal = random(*out.shape, seed=3)
    ours = torch.autograd.grad((out * goal).sum(), (first, second, length))
    theirs = torch.autograd.grad((expected * goal).sum(), (first, second, length))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_dora_is_pefts(tiny_t2v: Path) -> None:
    """PEFT's own forward, outputs and gradients, over the whole model. (With dropout PEFT's differs: docs/adr/0020.)"""
    lora = lora_config(4, 8.0, "attention+ffn", use_dora=True)
    results = []
    for variant in (None, DoraLinearVariant()):
        transformer = our_model(tiny_t2v, lora).train()
        set_adapters(transformer)
        for module in transformer.modules():
            if variant is not None and isinstance(module, LoraLayer):
                module.lora_variant["default"] = variant
        out = velocity(transformer, tiny_t2v)
        trained = [p for p in transformer.parameters() if p.requires_grad]
        results.append([out.detach(), *torch.autograd.grad(out.square().mean(), trained)])
    for ours, theirs in zip(*results, strict=True):
        assert relative(ours, theirs) < 1e-4


def test_dora_and_rounded_bases_are_switched_off_with_the_adapters(tiny_t2v: Path) -> None:
    lora = lora_config(4, 8.0, "attention", use_dora=True, base_dtype="int8")
    transformer, base = our_model(tiny_t2v, lora), our_model(tiny_t2v)
    round_blocks(base, "int8")
    set_adapters(transformer)
    with torch.no_grad():
        expected = velocity(base, tiny_t2v)
        assert relative(velocity(transformer, tiny_t2v), expected) > 1e-2
        with adapters_off(transformer):
            assert relative(velocity(transformer, tiny_t2v), expected) < 1e-5


# Routes (TREAD)


def test_a_route_drops_alike_on_every_worker_and_when_recomputed(tiny_t2v: Path) -> None:
    model, seen = model_config(tiny_t2v), []
    transformer = our_model(tiny_t2v, lora_config(4, 4.0, "attention", dropout=0.5)).train()
    set_adapters(transformer)
    layer: Any = transformer.get_submodule("visual_transformer_blocks.1.self_attention.to_query.lora_dropout.default")
    layer.register_forward_hook(lambda module, inputs, out: seen.append(out[0] != 0))
    key = dropout_key(transformer)
    assert key is not None
    for number, route in [(1, None), (1, Route(1, 1, 0.5)), (2, Route(1, 1, 0.5))]:
        key.set(number, CPU)
        routing = None if route is None else Routing((route,), 7, False)
        predict_velocity(
            transformer, model, random(1, 2, 8, 12, 16), False, torch.tensor([500.0]), random_text(4), routing
        )
    whole, routed, other = seen
    assert 2 * len(routed) == len(whole), "half of the tokens"
    assert torch.equal(routed, whole[: len(routed)]), "by their place among the kept, so that workers can share them"
    assert not torch.equal(routed, other)


# Starting from a LoRA


def saved(transformer: nn.Module, lora: LoraConfig, folder: Path, how: str) -> Path:
    layers: Any = get_peft_model_state_dict(transformer, state_dict=dict(transformer.state_dict()))
    config = {k: v for k, v in peft_config(lora).to_dict().items() if not isinstance(v, set)}
    if how == "diffusers":
        Kandinsky5T2VPipeline.save_lora_weights(
            str(folder), transformer_lora_layers=layers, transformer_lora_adapter_metadata=config
        )
    else:
        folder.mkdir()
        tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in layers.items()}
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config, default=str))
    return folder


@pytest.mark.parametrize("how", ["diffusers", "peft"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_is_taken_up_exactly(tiny_t2v: Path, tmp_path: Path, how: str, dora: bool) -> None:
    lora = lora_config(4, 8.0, "attention+ffn", use_dora=dora, use_rslora=True)
    source = our_model(tiny_t2v, lora)
    set_adapters(source)
    again = dataclasses.replace(lora, init_from=str(saved(source, lora, tmp_path / "lora", how)))
    lora_files.check(again, model_config(tiny_t2v))
    target = dict(our_model(tiny_t2v, again, seed=7).named_parameters())
    assert all(torch.equal(parameter, target[name]) for name, parameter in source.named_parameters())
    assert lora_files.identity(again).startswith("lora:")


@pytest.mark.parametrize(
    ("change", "key", "fix"),
    [
        ({"rank": 8}, "lora.rank", "lora.rank=4"),
        ({"alpha": 4.0}, "lora.alpha", "lora.alpha=8"),
        ({"use_rslora": True}, "lora.use_rslora", "lora.use_rslora=false"),
        ({"use_dora": True}, "lora.use_dora", "lora.use_dora=false"),
        ({"targets": "attention+ffn"}, "lora.targets", "lora.targets=attention lora.blocks=visual"),
        ({"blocks": "all"}, "lora.targets", "lora.blocks=visual"),
    ],
)
def test_another_lora_is_refused_with_the_key_that_fits(
    tiny_t2v: Path, tmp_path: Path, change: dict[str, Any], key: str, fix: str
) -> None:
    lora = lora_config(4, 8.0, "attention", blocks="visual")
    place = str(saved(our_model(tiny_t2v, lora), lora, tmp_path / "lora", "diffusers"))
    with pytest.raises(ConfigError) as error:
        lora_files.check(dataclasses.replace(lora, init_from=place, **change), model_config(tiny_t2v))
    assert error.value.key == key
    assert fix in error.value.fix


def test_what_is_no_lora_of_this_model_is_refused(tiny_t2v: Path, tmp_path: Path) -> None:
    model = model_config(tiny_t2v)
    lora = lora_config(4, 8.0, "attention", init_from=str(tmp_path))
    with pytest.raises(ConfigError, match="a LoRA's folder has"):
        lora_files.check(lora, model)
    safetensors.torch.save_file({"unet.down.lora_down.weight": random(2, 2)}, tmp_path / lora_files.LORA_FILE)
    with pytest.raises(ConfigError, match="no LoRA of this transformer"):
        lora_files.check(lora, model)
    plain = dataclasses.replace(lora, init_from=None)
    saved(our_model(tiny_t2v, plain), plain, tmp_path / "tiny", "diffusers")
    larger = dataclasses.replace(model, model_dim=2 * model.model_dim)
    with pytest.raises(ConfigError, match="the model's layer is"):
        lora_files.check(dataclasses.replace(lora, init_from=str(tmp_path / "tiny")), larger)


# Quantised bases


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_weights_are_off_by_no_more_than_the_formats_rounding(kind: str, dtype: torch.dtype) -> None:
    weight = random(48, 64) * torch.logspace(-3, 1, 48)[:, None]
    stored, scale = quantise(weight.to(dtype), kind, dtype)
    assert stored.nbytes == weight.numel()
    back = dequantise(stored, scale, kind, FP32)
    step = weight.abs().amax(1, keepdim=True) / 127
    # int8: half a step; float8: 3 bits of mantissa, and half the least subnormal.
    bound = 0.5 * step if kind == "int8" else weight.abs() / 16 + 2**-10 * weight.abs().amax(1, keepdim=True) / 448
    assert ((back - weight).abs() <= bound * 1.01 + weight.abs() * (2**-8 if dtype == BF16 else 1e-6)).all()
    assert relative(back, weight) > 1e-3


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_a_quantised_base_multiplies_what_it_stores_and_passes_gradients_on(tiny_t2v: Path, kind: str) -> None:
    lora = lora_config(4, 4.0, "attention", base_dtype=kind)
    transformer, plain = our_model(tiny_t2v, lora), our_model(tiny_t2v, dataclasses.replace(lora, base_dtype=None))
    layers = quantised_layers(transformer)
    with torch.no_grad():
        for path, layer in layers.items():
            other: Any = plain.get_submodule(path)
            assert 1e-3 < relative(layer.weight, other.weight) < (0.01 if kind == "int8" else 0.04)
            other.weight.copy_(layer.weight)
    for each in (transformer, plain):
        set_adapters(each)
    out, expected = velocity(transformer, tiny_t2v), velocity(plain, tiny_t2v)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    out.square().mean().backward()
    expected.square().mean().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            assert relative(parameter.grad, theirs[name].grad) < 1e-4, name  # type: ignore[arg-type]
    names = {path.split(".", 2)[2].removesuffix(".base_layer") for path in layers}
    assert "feed_forward.in_layer" in names and "self_attention.to_query" in names
    assert not any("modulation" in name for name in names)
    kept: list[Tensor] = []
    layer = next(iter(layers.values()))
    assert isinstance(layer, QuantisedLinear)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(random(1, 3, layer.in_features).requires_grad_())
    assert max(t.nbytes for t in kept) <= layer.out_features * layer.in_features, "bytes are kept, not the weight"
