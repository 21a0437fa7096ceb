"""What a benchmark times, and how its figures are counted."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import k5dist.model
from k5dist.benchmark import __main__ as command
from k5dist.benchmark.baseline import StockTransformer
from k5dist.benchmark.density import with_density
from k5dist.benchmark.scale import main as measure_scale
from k5dist.benchmark.settings import Benchmark, BenchmarkSettings, plan_benchmark
from k5dist.benchmark.shares import kind_of, length, longest_kernels, shares_of, union
from k5dist.benchmark.text import main as time_text
from k5dist.compose import compose
from k5dist.config import ConfigError, RunConfig
from k5dist.model.dit import VideoTransformer
from k5dist.model.forward import nabla_parameters
from k5dist.model.nabla import density, nabla_map
from k5dist.plan import ClusterFacts, RunPlan
from k5dist.shapes import PATCH


def settings(**changes: Any) -> BenchmarkSettings:
    """Those of `conf/benchmark.yaml`, but for the changes."""
    composed: Any = OmegaConf.to_container(compose(["+flavour=t2v-tiny"], "benchmark"), resolve=True)
    return BenchmarkSettings.from_mapping(composed["benchmark"] | changes)


def run_config(*overrides: str) -> RunConfig:
    plain: Any = OmegaConf.to_container(compose(list(overrides), "benchmark"), resolve=True)
    return RunConfig.from_mapping({key: value for key, value in plain.items() if key not in ("benchmark", "hydra")})


# Where the time goes


def test_a_union_is_disjoint_and_in_order() -> None:
    assert union([(5, 6), (0, 2), (1, 3), (3, 4), (0.5, 1)]) == [(0, 4), (5, 6)]
    assert union([(0, 9), (1, 2)]) == [(0, 9)]
    assert union([]) == []
    assert length([(0, 4), (5, 6)]) == 5


def test_communication_counts_where_nothing_hides_it() -> None:
    work = [
        ("nvjet_hsh_a", (0.0, 3.0)),
        ("nvjet_hsh_b", (2.0, 4.0)),  # on another stream: the same second is counted once
        ("flash_fwd_kernel", (4.0, 5.0)),
        ("vectorized_elementwise_kernel", (7.0, 8.0)),
        ("ncclDevKernel_AllGather_RING_LL", (3.5, 6.0)),  # hidden until 5, exposed for a second
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", (7.0, 7.5)),  # hidden
    ]
    shares = shares_of(work, 10.0)
    assert shares == pytest.approx(
        {"attention": 0.1, "linear": 0.4, "other": 0.1, "communication": 0.1, "idle": 0.3, "communication_hidden": 0.2}
    )
    assert sum(share for kind, share in shares.items() if kind != "communication_hidden") == pytest.approx(1)


def test_an_idle_device_and_one_that_only_communicates() -> None:
    idle = shares_of([], 2.0)
    assert idle.pop("idle") == 1
    assert set(idle.values()) == {0}
    talking = shares_of([("ncclDevKernel_AllGather_RING_LL", (0.0, 2.0))], 2.0)
    assert (talking["communication"], talking["communication_hidden"], talking["idle"]) == (1, 0, 0)


def test_the_longest_kernels_come_first() -> None:
    work = [
        ("nvjet_hsh_a", (0.0, 0.25)),
        ("flash_fwd_kernel", (1.0, 1.5)),
        ("nvjet_hsh_a", (2.0, 2.5)),
        ("memset", (3, 3.1)),
    ]
    first, second = longest_kernels(work, 2)
    assert first == {"name": "nvjet_hsh_a", "kind": "linear", "calls": 2, "ms": 750}
    assert (second["name"], second["kind"], second["ms"]) == ("flash_fwd_kernel", "attention", 500)


KNOWN = {
    "attention": [
        "void cudnn::fusion::compute_dot_do_o_specialized<true, 128, 64, 8>",
        "void cudnn::fusion::convert_dq_to_16bits<true, 64, 128, 256>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 128, 64, 4, false, false>>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<128>",
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90>>",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "k5dist::nabla_attention_backward",
        "k5dist::nabla_map",
        "k5dist::text_attention_backward",
    ],
    "linear": [
        "void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false>",
        "nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
        "aten::addmm",
        "aten::mm",
        "aten::bmm",
        "aten::_scaled_mm",
    ],
    "communication": [
        "ncclDevKernel_AllGather_RING_LL",
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL",
        "ncclDevKernel_SendRecv",
        "gloo:all_reduce",
        "c10d::_reduce_scatter_base_",
    ],
    "other": [
        "triton_poi_fused_addmm_gelu_3",
        "triton_poi_fused__scaled_dot_product_cudnn_attention_transpose_1",
        "void at::native::softmax_forward_kernel<float>",
        "triton_red_fused__to_copy_add_native_layer_norm_0",
        "triton_poi_fused_gelu_mul_3",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
        "Memcpy DtoD (Device -> Device)",
        "aten::copy_",
    ],
}


def own_kernels() -> list[str]:
    """The kernels' names on a GPU are those of their functions."""
    folder = Path(k5dist.model.__file__).parent
    sources = [
        (folder / name).read_text()
        for name in ("nabla_triton.py", "nabla_blocks_triton.py", "text_attention_triton.py")
    ]
    return [name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KNOWN.items() for name in names])
def test_kernels_are_told_by_their_names(kind: str, name: str) -> None:
    assert kind_of(name) == kind


def test_our_kernels_are_attention() -> None:
    names = own_kernels()
    assert {"forward_kernel", "dkdv_kernel", "dq_kernel", "_keep_kernel", "text_dkdv_kernel"} <= set(names)
    assert {name: kind_of(name) for name in names} == dict.fromkeys(names, "attention")


# Settings and plan


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("steps", 0), ("steps", "three"), ("warmup", -1), ("text_tokens", 0), ("blocks", 0)],
        *[("density", 0), ("density", 1.5), ("baseline", "stock")],
    ],
)
def test_a_setting_that_cannot_be_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**{key: value})
    assert (caught.value.key, caught.value.value) == (f"benchmark.{key}", value)


def test_a_benchmark_is_the_same_after_json() -> None:
    config = run_config("+flavour=t2v-tiny-nabla", "cluster.workers_per_node=2")
    asked = settings(blocks=1, density=0.7, out="figures.json")
    plan = with_density(plan_benchmark(config, asked, ClusterFacts(0)), asked.density)
    benchmark = Benchmark(plan, asked, "diffusers")
    assert Benchmark.from_mapping(json.loads(json.dumps(benchmark.to_mapping()))) == benchmark
    assert benchmark.bucket == plan.buckets[0]


def test_the_plan_is_of_one_bucket_one_clip_a_group_and_no_dropped_captions() -> None:
    facts = ClusterFacts(8, "NVIDIA H200")
    config = run_config("+flavour=t2v-pro-sft-5s-hd", "parallel.context=2", "data.source=s3://bucket/clips")
    assert len(config.resolutions) > 1
    assert config.train.caption_dropout > 0
    plan = plan_benchmark(config, settings(blocks=1), facts)
    (bucket,) = plan.buckets
    assert (bucket.frames, bucket.height, bucket.width) == config.validation_shape
    assert plan.config.model == dataclasses.replace(config.model, num_visual_blocks=1)
    assert (plan.world.data_parallel, plan.batch_size, plan.accumulation) == (4, 4, 1)
    assert plan.config.train.caption_dropout == 0
    assert plan.config.data.source is None
    assert plan.config.optimizer == config.optimizer
    whole = plan_benchmark(config, settings(), facts)
    assert whole.config.model == config.model


def test_the_stock_model_has_the_same_parameters_in_the_same_order() -> None:
    """Their random weights are drawn by position: it is what makes the two loops' losses comparable."""
    model = run_config("+flavour=t2v-tiny").model
    with torch.device("meta"):
        ours, stock = VideoTransformer(model), StockTransformer(model).stock
    shapes = [[(name, parameter.shape) for name, parameter in each.named_parameters()] for each in (ours, stock)]
    assert shapes[0] == shapes[1]


# Density


def kept_share(plan: RunPlan, heads: int) -> float:
    """What the map keeps of random queries and keys."""
    model = plan.config.model
    time, height, width = plan.buckets[0].latent_shape
    tokens = (time, height // PATCH, width // PATCH)
    parameters = nabla_parameters(model, tokens, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    shape = (1, plan.buckets[0].tokens, heads, model.head_dim)
    query, key = (torch.randn(*shape, generator=generator) for _ in range(2))
    return float(density(nabla_map(query, key, parameters), len(parameters.window_NW)))


@pytest.mark.parametrize(
    ("overrides", "heads", "asked"),
    [
        pytest.param([], 64, 0.7, id="five blocks"),
        pytest.param(["data.resolution=[256,384]", "data.num_frames=121"], 2, 0.1, id="186 blocks, few"),
        pytest.param(["data.resolution=[256,384]", "data.num_frames=121"], 2, 0.5, id="186 blocks, half"),
        pytest.param(["data.resolution=[256,384]", "data.num_frames=121"], 2, 1.0, id="186 blocks, all"),
    ],
)
def test_random_maps_keep_the_density_that_is_asked_for(overrides: list[str], heads: int, asked: float) -> None:
    plan = plan_benchmark(run_config("+flavour=t2v-tiny-nabla", *overrides), settings(), ClusterFacts(0))
    assert kept_share(with_density(plan, asked), heads) == pytest.approx(asked, abs=0.02)
    assert abs(kept_share(plan, heads) - asked) > 0.05, "which the checkpoint's own P would not"


def test_less_than_the_window_cannot_be_kept() -> None:
    plan = plan_benchmark(run_config("+flavour=t2v-tiny-nabla"), settings(), ClusterFacts(0))
    for asked in (0.2, 0.51):  # five frames of a block each, which see themselves and their neighbours: 13 of 25
        with pytest.raises(ConfigError, match=re.escape("keeps 52.0% of this clip's blocks")) as caught:
            with_density(plan, asked)
        assert (caught.value.key, caught.value.fix) == ("benchmark.density", "benchmark.density=0.62")
    assert with_density(plan, 0.53).config.model.attention_P == pytest.approx(0.01 / 0.48, rel=1e-4)


def test_a_window_of_all_blocks_keeps_all() -> None:
    config = run_config("+flavour=t2v-tiny-nabla", "data.num_frames=5")  # two latent frames, which see each other
    plan = plan_benchmark(config, settings(), ClusterFacts(0))
    with pytest.raises(ConfigError) as caught:
        with_density(plan, 0.9)
    assert caught.value.fix == "benchmark.density=1.00"
    assert kept_share(with_density(plan, 1.0), heads=2) == 1


def test_dense_attention_has_no_density() -> None:
    plan = plan_benchmark(run_config("+flavour=t2v-tiny"), settings(), ClusterFacts(0))
    assert with_density(plan, 0.01) is plan


# The command's errors


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["train", "+flavour=t2v-tiny", "benchmark.bloks=1"], "benchmark.bloks"),
        (["train", "+flavour=t2v-tiny", "benchmark.baseline=stock"], "benchmark.baseline"),
        (["train", "+flavour=t2v-tiny-nabla", "benchmark.density=0.2"], "benchmark.density"),
        (["train", "+flavour=t2v-tiny", "parallel.context=2", "benchmark.baseline=diffusers"], "benchmark.baseline"),
        (["trian", "+flavour=t2v-tiny"], "command"),
        ([], "command"),
    ],
)
def test_a_mistake_is_one_block_and_starts_no_gang(
    arguments: list[str], key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(*args: Any, **options: Any) -> None:
        pytest.fail("a gang was started")

    monkeypatch.setattr(command.subprocess, "run", start)
    assert command.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Configuration error"
    assert [line.split()[0] for line in lines[1:]] == ["key", "value", "rule", "fix"]
    assert lines[1].split() == ["key", key]


def test_text_encoders_are_timed_and_batches_agree(tmp_path: Path) -> None:
    time_text(["--quick", "--out", str(tmp_path / "text.json")])
    found = json.loads((tmp_path / "text.json").read_text())
    alone, batched = found["rows"]
    assert (alone["batch"], batched["batch"], found["captions"]) == (1, 4, 16)
    assert found["tokens"] > 16
    assert 0 < batched["difference"] < 1e-5, "padding may change the rounding of fp32, and no more"


def test_every_part_of_many_samples_is_measured(tmp_path: Path) -> None:
    measure_scale(["--rows", "300", "--out", str(tmp_path / "scale.json")])
    found = json.loads((tmp_path / "scale.json").read_text())
    assert found["rows"] == 300
    reading = {"read .jsonl", "read .csv", "read .parquet"}
    assert found["parts"].keys() == reading | {
        *("open the index", "note a run's places", "open a run", "order an epoch")
    }
    assert all(part["seconds"] > 0 and part["peak_mib"] > 10 for part in found["parts"].values())
    assert (found["parts"]["open the index"]["parts"], found["parts"]["order an epoch"]["batches"]) == (5, 6)
