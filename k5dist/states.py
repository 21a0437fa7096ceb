"""What a worker keeps of weights, gradients and an optimiser's states: their bytes, by configuration and world.

Nothing here depends on clips. Every number that is no plain arithmetic is a named constant, with where it comes from.
"""

from __future__ import annotations

import math

from k5dist import estimate
from k5dist.config import RunConfig
from k5dist.world import World

FP32 = 4  # bytes

# Bytes of a trained weight and of its gradient where not fp32; the modules that stay in fp32 keep theirs so.
WEIGHT_BYTES = {"adamw_bf16": 2}
# Bytes of what an optimiser keeps of a weight: two moments; z and a moment; four tensors; two codes with a scale a
# block of 256. Muon keeps one moment of the blocks' matrices, Adafactor rows and columns.
STATE_BYTES = {"adamw": 2 * FP32, "adamw_bf16": 2 * 2, "adamw_schedulefree": 2 * FP32, "prodigy": 4 * FP32}
STATE_BYTES |= {"adamw_8bit": 2 * (1 + FP32 / 256), "muon": FP32}

# FSDP2 holds the block at work and the one it prefetches whole, also where there is but one shard. Full fine-tuning
# adds the unsharded gradients of up to two blocks, in the compute type, and the fp32 input of one reduce-scatter.
GATHERED_BLOCKS = 2
GRADIENT_BLOCKS = 2
REDUCED_BLOCKS = 1


def trainable_parameters(config: RunConfig) -> int:
    head = estimate.crepa_parameters(config)
    if config.adapter == "full":
        return estimate.parameters(config.model) + head
    return estimate.lora_parameters(config.model, config.lora) + head


def element(config: RunConfig, world: World) -> int:
    """Bytes of the compute type. (On a CPU bf16 operations work in fp32.)"""
    return 2 if config.train.precision == "bf16" and world.device == "cuda" else FP32


def trained_bytes(config: RunConfig) -> int:
    """One number for each trained weight, in the type that the optimiser works in."""
    exact = estimate.exact_parameters(config.model) if config.adapter == "full" else 0
    return (trainable_parameters(config) - exact) * WEIGHT_BYTES.get(config.optimizer.kind, FP32) + exact * FP32


def state_bytes(config: RunConfig) -> float:
    """What the optimiser keeps, and an average of the weights where it lies on the device."""
    count, kind = trainable_parameters(config), config.optimizer.kind
    exact = estimate.exact_parameters(config.model) if config.adapter == "full" else 0
    average = count * FP32 if config.ema.enabled and config.ema.device == "device" else 0
    if kind == "adafactor":  # a row's and a column's mean for each of a matrix's, by its shorter side
        shorter = config.model.model_dim if config.adapter == "full" else config.lora.rank
        return count * 2 * FP32 / shorter + average
    if kind in ("adamw_bf16", "muon"):  # these differ in the modules that stay in fp32: modulations for the most part
        return (count - exact) * STATE_BYTES[kind] + exact * 2 * FP32 + average
    return count * STATE_BYTES[kind] + average


def weights(config: RunConfig, world: World) -> float:
    """A frozen base lies in the compute type, but for what stays in fp32."""
    whole = trained_bytes(config)
    if config.adapter != "full":
        model = config.model
        base, exact = estimate.parameters(model), estimate.exact_parameters(model)
        if config.train.stream_weights:  # those of two blocks are there: `gathered` has them
            base -= model.num_visual_blocks * estimate.visual_block_parameters(model)
            exact -= model.num_visual_blocks * estimate.visual_block_exact_parameters(model)
        whole += (base - exact) * element(config, world) + exact * FP32
        there = estimate.linear_parameters(model, visual=not config.train.stream_weights)
        whole -= _saved_a_weight(config, world) * there
    return whole / world.weight_shards


def _saved_a_weight(config: RunConfig, world: World) -> int:
    """Bytes that `lora.base_dtype` takes off each weight of the blocks' linear layers; scales are small."""
    return element(config, world) - 1 if config.adapter == "lora" and config.lora.base_dtype else 0


def _made_anew(config: RunConfig, world: World) -> float:
    """Weights that a layer makes whole while it works: out of its bytes in the compute type, and with DoRA the product
    of its factors, of which uncompiled layers have three more in fp32."""
    if config.adapter == "full":
        return 0
    model, lora, size = config.model, config.lora, element(config, world)
    compiled = config.train.compile and world.device == "cuda"
    made = 0
    if lora.base_dtype:
        made += model.model_dim * model.ff_dim * (size if compiled else size + 2 * FP32)
    if lora.use_dora:
        layers = {layer for names in lora.layers.values() for layer in names}
        largest = max(math.prod(estimate.layer_shape(model, layer)) for layer in layers)
        made += largest * (size if compiled else size + 3 * FP32)
    return made


def gradients(config: RunConfig, world: World, blocks: int) -> float:
    """Shards, when the backward is through with `blocks` visual blocks.

    An adapter's are summed up whole over a step's clips and reduced with the last of them; with a second clip those of
    all weights are there from its beginning on.
    """
    whole = trained_bytes(config)
    batch = config.train.batch_size
    accumulates = batch is None or batch > world.data_parallel
    if config.adapter != "full":
        return whole / world.weight_shards + (whole if accumulates else 0)
    if accumulates:
        return whole / world.weight_shards
    size, exact = estimate.visual_block_parameters(config.model), estimate.visual_block_exact_parameters(config.model)
    return (
        blocks * ((size - exact) * WEIGHT_BYTES.get(config.optimizer.kind, FP32) + exact * FP32) / world.weight_shards
    )


def gathered(config: RunConfig, world: World) -> float:
    """Unsharded copies: blocks in turn, and the root's few weights all the time."""
    model, size_of_one = config.model, element(config, world)
    block, block_exact = estimate.visual_block_parameters(model), estimate.visual_block_exact_parameters(model)
    root, root_exact = estimate.root_parameters(model), estimate.root_exact_parameters(model)
    size = GATHERED_BLOCKS * (size_of_one * (block - block_exact) + FP32 * block_exact)
    size += size_of_one * (root - root_exact) + FP32 * root_exact
    size -= GATHERED_BLOCKS * _saved_a_weight(config, world) * estimate.block_linear_parameters(model, "visual")
    size += _made_anew(config, world)
    if config.adapter == "full":
        size += GRADIENT_BLOCKS * block * size_of_one + REDUCED_BLOCKS * block * FP32
    return size
