"""Predicted memory: each part by numbers worked out by hand, the one measured peak, and what a plan keeps by it."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest

from k5dist import estimate, memory
from k5dist.compose import compose, to_run_config
from k5dist.config import ConfigError, RunConfig
from k5dist.estimate import GIB, MIB, Recompute
from k5dist.fit import check
from k5dist.memory import Memory
from k5dist.plan import ClusterFacts, RunPlan, estimates, make_plan
from k5dist.shapes import Bucket
from k5dist.world import World, make_world

PRO = ("+flavour=t2v-pro-sft-5s-hd", "data.resolution=[512,768]")
DENSE = (*PRO, "model.attention_type=regular")
LITE = ("+flavour=t2v-lite-sft-5s", "data.resolution=[512,768]")
LONG = ("+flavour=t2v-pro-sft-10s-hd", "data.resolution=[768,1280]")
TOKENS = 47_616  # of 121×512×768
UNIT = TOKENS * 4096 * 2  # one bf16 activation of Pro
FULL = Recompute(0, 0)
H200 = "NVIDIA H200"
ONE_CLIP_EACH = "train.batch_size=2"  # on two workers: nothing is accumulated


@functools.cache
def configure(*overrides: str) -> RunConfig:
    return to_run_config(compose(list(overrides)))


def predict(*overrides: str, gpus: int = 2, recompute: Recompute = FULL) -> Memory:
    config = configure(*overrides)
    world = make_world(config, ClusterFacts(gpus, H200))
    bucket = Bucket(config.data.num_frames, *config.resolutions[0])
    return memory.predict(config, world, bucket, recompute)


def planned(*overrides: str, gpus: int = 2, name: str | None = H200) -> RunPlan:
    return make_plan(configure(*overrides), ClusterFacts(gpus, name), "weights")


# The parts, by hand


MEASURED = [  # on one H200 (torch 2.11), compiled, one clip a step: `launch/benchmark.sh memory` and `one`
    (8, DENSE, (), Recompute(0, 0), 21.21),
    (8, DENSE, (), Recompute(0, 8), 21.23),
    (8, DENSE, (), Recompute(8, 0), 45.77),
    (8, DENSE, ("adapter=full",), Recompute(0, 0), 58.90),
    (8, DENSE, ("adapter=full",), Recompute(0, 8), 56.71),
    (8, DENSE, ("adapter=full",), Recompute(8, 0), 81.80),
    (4, DENSE, (), Recompute(0, 4), 15.64),
    (4, DENSE, ("adapter=full", "optimizer.kind=adamw_bf16"), Recompute(0, 4), 26.54),
    (1, (*PRO, "data.resolution=[768,1280]"), (), Recompute(1, 0), 21.85),
]


@pytest.mark.parametrize(("blocks", "clip", "settings", "recompute", "gib"), MEASURED)
def test_measured_peaks_are_predicted(
    blocks: int, clip: tuple[str, ...], settings: tuple[str, ...], recompute: Recompute, gib: float
) -> None:
    config = configure(*clip, "train.batch_size=1", *settings)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_visual_blocks=blocks))
    world = make_world(config, ClusterFacts(1, H200))
    needed = memory.predict(config, world, Bucket(121, *config.resolutions[0]), recompute)
    assert needed.allocated / GIB == pytest.approx(gib, rel=0.05)


def test_a_frozen_base_lies_in_bf16_but_for_its_fp32_modules() -> None:
    blocks, texts = 60 * 9 * 1025 * 4096, 4 * 6 * 1025 * 4096  # modulations of visual and of text blocks
    exact = blocks + texts + 2 * 1025 * 4096 + (4097 * 1024 + 1025 * 1024)  # and of the output, and the time embedding
    adapters = 60 * 2 * 4 * 32 * 8192 + 4 * 4 * 32 * 8192
    base = 2 * estimate.parameters(configure(*PRO).model) + 2 * exact
    assert predict(*PRO).weights == (base + 4 * adapters) / 2
    assert base / 2 / GIB == pytest.approx(20.2, abs=0.05)
    exact_run = predict(*PRO, "train.precision=fp32")
    assert exact_run.weights == 4 * (estimate.parameters(configure(*PRO).model) + adapters) / 2


def test_an_adapters_states_are_fp32_shards_and_its_sum_over_clips_is_whole() -> None:
    adapters = 60 * 2 * 4 * 32 * 8192 + 4 * 4 * 32 * 8192
    assert predict(*PRO, ONE_CLIP_EACH).gradients == 4 * adapters / 2
    assert predict(*PRO, "train.batch_size=4").gradients == 4 * adapters / 2 + 4 * adapters
    assert predict(*PRO).optimizer == 8 * adapters / 2
    assert predict(*PRO, "optimizer.kind=adamw_bf16").optimizer == 4 * adapters / 2


def test_all_weights_take_sixteen_bytes_or_eight() -> None:
    whole = estimate.parameters(configure(*PRO).model)
    full = predict(*PRO, "adapter=full")
    assert (full.weights, full.gradients, full.optimizer) == (2 * whole, 2 * whole, 4 * whole)
    small = predict(*PRO, "adapter=full", "optimizer.kind=adamw_bf16")
    half = whole + estimate.exact_parameters(configure(*PRO).model)  # 2 bytes over 2 GPUs, 4 where fp32 stays
    assert (small.weights, small.gradients, small.optimizer) == (half, half, 2 * half)
    states = {"weights": full.weights, "gradients": full.gradients, "optimizer": full.optimizer}
    assert dataclasses.replace(small, **states) == full


def test_gathered_are_two_blocks_and_the_root() -> None:
    modulation, attention, ff = 9 * 1025 * 4096, 4 * (4096**2 + 4096) + 2 * 128, 2 * 4096 * 16384
    block = 2 * (2 * attention + ff) + 4 * modulation
    time, out = 4097 * 1024 + 1025 * 1024, 2 * 1025 * 4096
    text, pooled = 3585 * 4096 + 2 * 4096, 769 * 1024 + 2 * 1024
    root = 4 * (time + out) + 2 * (text + pooled + (4 * 33 + 1) * 4096 + 4097 * 64)
    lora = predict(*PRO).gathered
    assert lora == 2 * block + root
    assert lora / GIB == pytest.approx(1.35, abs=0.05)
    assert predict(*PRO, gpus=1).gathered == lora, "one shard gathers copies, too"
    # Gradients of two blocks in bf16, one block's in fp32 on its way to the shards.
    assert predict(*PRO, "adapter=full").gathered == lora + (2 * 2 + 4) * (modulation + 2 * attention + ff)


def test_kept_are_inputs_attention_outputs_or_all() -> None:
    lse = TOKENS * 32 * 4
    inputs = predict(*DENSE).kept
    assert inputs == 60 * UNIT
    assert inputs / GIB == pytest.approx(21.8, abs=0.05)
    assert predict(*DENSE, recompute=Recompute(0, 7)).kept == inputs + 7 * (UNIT + lse)
    everything = 6.8 * UNIT + TOKENS * 16384 * 2 + lse
    assert predict(*DENSE, recompute=Recompute(3, 7)).kept == pytest.approx(inputs + 7 * (UNIT + lse) + 3 * everything)


def test_sparse_attention_keeps_its_packed_map() -> None:
    words = 32 * 744 * 24 * 4  # 47,616 tokens are 744 blocks, and 744 bits 24 words
    dense, sparse = (predict(*overrides, recompute=Recompute(2, 5)).kept for overrides in (DENSE, PRO))
    assert sparse - dense == pytest.approx(7 * words)


def test_sparse_attention_lists_its_blocks() -> None:
    assert predict(*DENSE).sparse == 0
    assert predict(*PRO).sparse == 2 * 32 * 744**2 * 2 + 32 * 744**2 * 4
    assert predict(*LONG).sparse == (640 + 256) * MIB, "lists and scores are made in chunks"
    short = (*PRO, "data.num_frames=61", "parallel.context=2")  # 16 × 32 × 48 tokens are 384 blocks; 16 heads a worker
    assert predict(*short).sparse == 2 * 16 * 384**2 * 2 + 16 * 384**2 * 4


def test_the_working_set_is_counted_in_units() -> None:
    compiled = predict(*DENSE).working
    assert compiled == pytest.approx(25.9 * UNIT)
    assert compiled / GIB == pytest.approx(9.4, abs=0.1)
    assert predict(*DENSE, "adapter=full").working == pytest.approx(27 * UNIT)
    assert predict(*DENSE, recompute=Recompute(0, 60)).working == pytest.approx(17.8 * UNIT)
    assert predict(*DENSE, recompute=Recompute(60, 0)).working == pytest.approx(6.6 * UNIT)
    assert predict(*DENSE, "train.compile=false").working == pytest.approx(1.6 * compiled)
    assert predict(*DENSE, "train.precision=fp32").working == pytest.approx(2 * compiled)


def test_the_fullest_moment_counts() -> None:
    """Block by block, from the last on: what is kept goes, and without accumulation the gradients come."""
    mixed = predict(*DENSE, recompute=Recompute(1, 2))
    assert mixed.working == pytest.approx(25.9 * UNIT), "at the last of the 57 blocks that keep nothing"
    assert mixed.kept == pytest.approx(57 * UNIT)
    more = predict(*DENSE, recompute=Recompute(20, 40))
    lse = TOKENS * 32 * 4
    assert more.kept == pytest.approx(60 * UNIT + 40 * (UNIT + lse) + 20 * (6.8 * UNIT + TOKENS * 16384 * 2 + lse))
    accumulated, alone = (predict(*DENSE, "adapter=full", f"train.batch_size={n}") for n in (4, 2))
    assert accumulated.gradients == accumulated.weights
    assert (alone.kept, alone.gradients < 0.95 * accumulated.gradients) == (UNIT, True), "at the first block"


def test_what_waits_on_the_host_is_not_on_the_gpu() -> None:
    lse = TOKENS * 32 * 4
    attention = 2 * UNIT + lse
    everything = 7.8 * UNIT + TOKENS * 16384 * 2 + lse
    assert predict(*DENSE, recompute=Recompute(20, 40, 30)).kept == pytest.approx(12 * attention + 20 * everything)
    assert predict(*DENSE, recompute=Recompute(20, 40, 60)).kept == pytest.approx(2 * everything)


def test_workers_that_share_a_clip_hold_their_share_of_its_tokens() -> None:
    alone, shared = (predict(*PRO, f"parallel.context={n}", recompute=Recompute(4, 9)) for n in (1, 2))
    assert shared.kept == pytest.approx(alone.kept / 2)
    assert shared.working == pytest.approx((6.6 + 4) * UNIT / 2), "and buffers to swap tokens for heads"
    assert (shared.weights, shared.optimizer, shared.gathered) == (alone.weights, alone.optimizer, alone.gathered)
    odd = predict(*DENSE, "data.num_frames=1", "parallel.context=32", gpus=32)  # 1,536 tokens
    assert odd.kept == 60 * 48 * 4096 * 2


def test_streamed_weights_are_on_the_gpu_two_blocks_at_a_time() -> None:
    plain, streamed = predict(*PRO, gpus=1), predict(*PRO, "train.stream_weights=true", gpus=1)
    model = configure(*PRO).model
    exact, size = estimate.visual_block_exact_parameters(model), estimate.visual_block_parameters(model)
    assert plain.weights - streamed.weights == 60 * (2 * (size - exact) + 4 * exact)
    assert streamed.gathered == plain.gathered >= 2 * (2 * (size - exact) + 4 * exact)
    assert dataclasses.replace(streamed, weights=plain.weights) == plain


def test_latents_and_rope_tables_are_the_workspace() -> None:
    latents, tables = 31 * 64 * 96 * 16 * 4, 2 * TOKENS * 128 * 4
    assert predict(*DENSE).workspace == 8 * latents + tables


def test_validation_videos_count_where_they_need_more_than_training() -> None:
    video = ("validation.prompts=[a fox]", "validation.num_frames=961")  # 241 latent frames: 370,176 tokens
    none, one = predict(*DENSE, "validation.num_frames=961"), predict(*DENSE, *video)
    assert one.total - none.total == pytest.approx(12 * 370_176 * 8192 - (none.kept + none.working))
    assert predict(*DENSE, "validation.prompts=[a fox]") == predict(*DENSE)


def test_the_total_is_the_sum_and_torch_does_not_see_the_runtime() -> None:
    needed = predict(*PRO)
    assert needed.runtime == 1.25 * GIB
    assert needed.total == pytest.approx(math.fsum(dataclasses.asdict(needed).values()))
    assert needed.allocated == pytest.approx(needed.total - 1.25 * GIB)


def test_a_cpu_world_is_counted_in_fp32() -> None:
    needed = predict("+flavour=t2v-tiny", gpus=0)
    tokens = 5 * 4 * 6
    assert needed.kept == 4 * tokens * 64 * 4
    assert needed.working == pytest.approx(1.6 * 25.9 * tokens * 64 * 4)
    assert needed.runtime == 0
    assert predict("+flavour=t2v-tiny", "train.precision=bf16", gpus=0).kept == needed.kept, "bf16 works in fp32 there"


# What must hold whatever the numbers


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("overrides", [PRO, LITE], ids=["pro", "lite"])
def test_more_of_the_good_is_never_more_memory(overrides: tuple[str, ...], adapter: str) -> None:
    config = configure(*overrides, f"adapter={adapter}", "train.batch_size=64")
    heads = config.model.num_heads

    def total(shard: int, context: int, recompute: Recompute = FULL, frames: int = 121) -> float:
        world = World(1, shard * context, "cuda", H200, shard, 1, context)
        return memory.predict(config, world, Bucket(frames, 512, 768), recompute).total

    shards = [total(n, 1) for n in (1, 2, 4, 8, 64)]
    contexts = [total(2, n) for n in (1, 2, 4, 8, 16) if heads % n == 0]
    for fewer_and_fewer in (shards, contexts):
        assert fewer_and_fewer == sorted(fewer_and_fewer, reverse=True)
    keeping = [total(2, 1, Recompute(*n)) for n in ((0, 0), (0, 20), (9, 11), (20, 0))]
    lengths = [total(2, 1, frames=n) for n in (1, 17, 61, 121, 241)]
    for more_and_more in (keeping, lengths):
        assert more_and_more == sorted(more_and_more)


# What a plan keeps


def test_the_host_takes_no_more_than_the_gpu_needs_and_it_may() -> None:
    full = (*DENSE, "adapter=full", "optimizer.kind=adamw_bf16")
    alone, some, much = (planned(*full, f"train.offload_gib={gib}") for gib in (0, 24, 400))
    assert alone.recompute.offload == 0
    assert alone.recompute.keep + alone.recompute.attention < 60
    assert 0 < some.recompute.offload < 60
    assert some.recompute.keep + some.recompute.attention == 60 > alone.recompute.attention
    assert much.recompute.keep == 60 > some.recompute.keep
    for plan in (alone, some, much):
        assert estimates(plan).memory.total <= memory.usable(estimate.gpu_facts(H200)[2])
    blocks, lse = some.recompute.offload, TOKENS * 32 * 4
    attention, everything = 2 * UNIT + lse, 8.7 * UNIT + TOKENS * 16384 * 2 + lse
    linear = max(0, blocks - some.recompute.attention)
    assert (blocks - linear) * attention + linear * everything <= 0.9 * 24 * GIB
    assert planned(*LITE, "train.offload_gib=24").recompute.offload == 0, "what fits stays"


def test_a_word_is_the_same_in_all_blocks() -> None:
    for word, recompute in {"linear": (60, 0), "attention": (0, 60), "full": (0, 0)}.items():
        plan = planned(*PRO, f"train.activation_checkpointing={word}")
        assert (plan.recompute.keep, plan.recompute.attention) == recompute


def test_cpu_worlds_recompute_everything() -> None:
    plan = planned("+flavour=t2v-tiny", "train.activation_checkpointing=auto", gpus=0, name=None)
    assert plan.recompute == FULL


def test_auto_keeps_attention_on_a_large_gpu_and_less_on_a_smaller() -> None:
    large, small = (planned(*PRO, name=name).recompute for name in (H200, "NVIDIA H100 80GB HBM3"))
    assert large.keep + large.attention == 60
    assert large.keep < 30
    assert small.keep <= 3
    assert 0 < small.attention < 60
    assert planned(*PRO, gpus=1, name="NVIDIA RTX 4090").recompute == FULL


@pytest.mark.parametrize(
    ("overrides", "gpus", "name"),
    [
        (PRO, 2, H200),
        (PRO, 2, "NVIDIA H100"),
        ((*LITE, "adapter=full"), 1, "NVIDIA H100"),
        ((*LONG, "parallel.context=2"), 2, H200),
    ],
)
def test_auto_fills_the_gpu_up_to_its_margin(overrides: tuple[str, ...], gpus: int, name: str) -> None:
    plan = planned(*overrides, gpus=gpus, name=name)
    limit = memory.usable(estimate.gpu_facts(name)[2])
    keep, attention = plan.recompute.keep, plan.recompute.attention
    assert estimates(plan).memory.total <= limit
    all_blocks = keep + attention == plan.config.model.num_visual_blocks
    more = Recompute(keep + 1, attention - 1) if all_blocks else Recompute(keep, attention + 1)
    assert memory.predict(plan.config, plan.world, plan.buckets[0], more).total > limit


def test_ten_seconds_in_hd_fit_on_two_gpus() -> None:
    plan = planned(*LONG, "parallel.context=2")
    needed = estimates(plan).memory
    assert plan.buckets[0].tokens == 234_240
    assert predict(*LONG, "parallel.context=2").kept / GIB == pytest.approx(53.6, abs=0.1)
    assert needed.weights / GIB == pytest.approx(20.4, abs=0.1)
    assert 0 < plan.recompute.attention < 60
    assert estimates(plan).memory_note is None


def test_the_largest_bucket_decides() -> None:
    preset = planned("+flavour=t2v-pro-sft-5s-hd", gpus=2)
    largest = planned("+flavour=t2v-pro-sft-5s-hd", "data.resolution=[1024,1024]", gpus=2)
    assert preset.recompute == largest.recompute
    assert estimates(preset).memory == estimates(largest).memory


def test_doubts_are_said() -> None:
    assert "MORE MEMORY" in str(estimates(planned(*PRO, "adapter=full", gpus=1)).memory_note)
    assert estimates(planned(*LITE, gpus=1)).memory_note is None
    full = (*PRO, "adapter=full", "optimizer.kind=adamw_bf16")
    close = planned(*full, "train.activation_checkpointing=attention")
    assert "may run out" in str(estimates(close).memory_note)
    assert estimates(planned("+flavour=t2v-tiny", gpus=0, name=None)).memory_note is None


@pytest.mark.parametrize(
    ("kind", "bytes_each"),
    [("adamw_8bit", 2 + 8 / 256), ("adamw_schedulefree", 8), ("prodigy", 16), ("adafactor", 8 / 4096)],
)
def test_what_each_optimiser_keeps_of_all_weights(kind: str, bytes_each: float) -> None:
    rate = {"prodigy": 1, "adafactor": 1e-2}.get(kind, 1e-5)
    settings = (*PRO, "adapter=full", f"optimizer.kind={kind}", f"optimizer.lr={rate}")
    whole = estimate.parameters(configure(*PRO).model)
    assert predict(*settings).optimizer == pytest.approx(bytes_each * whole / 2)
    assert predict(*settings).weights == 2 * whole


def test_muon_keeps_one_moment_of_the_matrices_and_an_average_is_a_weight_more() -> None:
    model = configure(*PRO).model
    whole, exact = estimate.parameters(model), estimate.exact_parameters(model)
    muon = predict(*PRO, "adapter=full", "optimizer.kind=muon")
    assert muon.optimizer == (4 * (whole - exact) + 8 * exact) / 2
    plain, averaged = (predict(*PRO, f"ema.enabled={on}") for on in ("false", "true"))
    adapters = 60 * 2 * 4 * 32 * 8192 + 4 * 4 * 32 * 8192
    assert averaged.optimizer - plain.optimizer == 4 * adapters / 2
    assert predict(*PRO, "ema.enabled=true", "ema.device=host").optimizer == plain.optimizer


def test_a_share_of_the_gpu_is_planned_by() -> None:
    """With less of the card to take, less is kept, and the plan stays within it."""
    words = ["+flavour=t2v-lite-sft-5s", "data.num_frames=121", "data.resolution=[512,768]"]
    facts = ClusterFacts(1, "NVIDIA H200")
    whole, share = (
        make_plan(to_run_config(compose([*words, *more])), facts, "") for more in ([], ["train.gpu_memory_gib=24"])
    )
    assert (whole.recompute.keep, share.recompute.keep < 32) == (32, True)
    needed = memory.predict(share.config, share.world, share.buckets[0], share.recompute)
    assert needed.total <= 24 * GIB < memory.predict(whole.config, whole.world, whole.buckets[0], whole.recompute).total
    assert share.run_fingerprint == whole.run_fingerprint
    with pytest.raises(ConfigError, match=r"of 6\.0 \(NVIDIA H200\)"):
        check(to_run_config(compose([*words, "train.gpu_memory_gib=6"])), facts)


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_a_quantised_base_takes_a_byte_a_weight(kind: str) -> None:
    plain, quantised = predict(*PRO, gpus=1), predict(*PRO, f"lora.base_dtype={kind}", gpus=1)
    dim, ff = 4096, 16384
    linear = 60 * (8 * dim**2 + 2 * dim * ff) + 4 * (4 * dim**2 + 2 * dim * ff)
    assert plain.weights - quantised.weights == linear
    assert plain.gathered - quantised.gathered == 2 * (8 * dim**2 + 2 * dim * ff) - 2 * dim * ff
    streamed = (*PRO, "train.stream_weights=true")
    plain, quantised = predict(*streamed, gpus=1), predict(*streamed, f"lora.base_dtype={kind}", gpus=1)
    assert plain.weights - quantised.weights == 4 * (4 * dim**2 + 2 * dim * ff), "visual blocks are not there"


def test_dora_multiplies_the_factors_of_its_largest_layer() -> None:
    dora = ("lora.use_dora=true", "train.activation_checkpointing=full")
    plain, attention = predict(*PRO), predict(*PRO, *dora)
    everything = predict(*PRO, *dora, "lora.targets=attention+ffn")
    eager = predict(*PRO, *dora, "train.compile=false")
    assert attention.gathered - plain.gathered == 2 * 4096**2
    assert everything.gathered - plain.gathered == 2 * 4096 * 16384
    assert eager.gathered - plain.gathered == (2 + 3 * 4) * 4096**2, "the sum in fp32, its parts, its squares"
