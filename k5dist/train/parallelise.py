"""Parallelism as functions applied to a finished model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_leaves

from k5dist.config import TrainConfig
from k5dist.estimate import GIB, Recompute
from k5dist.memory import policy_of
from k5dist.model.attention import prefer_flash
from k5dist.model.context import ContextGroup
from k5dist.model.dit import FP32_MODULES, VideoTransformer, VisualBlock
from k5dist.model.float8 import use_float8
from k5dist.model.lora import lengths_of_dora, share_dropout
from k5dist.model.weight_stream import WeightStream
from k5dist.plan import World
from k5dist.train.offload import Offload

# Graphs a block may have (buckets × recomputation × training and validation); dynamo's default of 8 is soon reached.
RECOMPILE_LIMIT = 64


def make_mesh(world: World) -> DeviceMesh:
    """Workers as (replicate, shard, context): HSDP's two axes, and the neighbours that share a clip's tokens."""
    names = ("replicate", "shard", "context")
    return init_device_mesh(world.device, (world.replicate, world.shard, world.context), mesh_dim_names=names)


def compute_dtype(train: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if train.precision == "bf16" else torch.float32


def parallelise(transformer: VideoTransformer, mesh: DeviceMesh, train: TrainConfig, recompute: Recompute) -> None:
    """Context parallelism, recomputation, compilation, sharding, in that order and in place; weights may be on meta."""
    if mesh["context"].size() > 1:
        group = ContextGroup.of(mesh["context"].get_group())
        transformer.share_tokens(group)
        share_dropout(transformer, group.rank)
    if train.attention != "auto":
        prefer_flash(transformer, train.attention)
    if train.float8:
        use_float8(transformer.visual_transformer_blocks, mesh.device_type)
    set_recompute(transformer, recompute)
    if train.stream_weights:
        transformer.stream = WeightStream(transformer.visual_transformer_blocks, _device(mesh))
    if train.compile and mesh.device_type == "cuda":
        compile_blocks(transformer)
        if recompute.offload:
            offload_blocks(transformer, Offload(recompute.offload, int(train.offload_gib * GIB), _device(mesh)))
    shard(transformer, mesh, compute_dtype(train))


def _device(mesh: DeviceMesh) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")


def set_recompute(transformer: VideoTransformer, recompute: Recompute) -> None:
    """The last blocks keep the most: when the backward begins, all that is kept is there, and they need little more."""
    blocks = transformer.visual_transformer_blocks
    for number, block in enumerate(blocks):
        assert isinstance(block, VisualBlock)
        block.recompute = policy_of(recompute, number, len(blocks))


def compile_blocks(transformer: VideoTransformer, backend: Any = "inductor") -> None:
    """Each visual block as one graph, which all of them share; text blocks are too small to be worth it.

    The forward is compiled, not the module: FSDP2's hooks, which gather its weights, stay outside.
    """
    from torch._inductor import config as inductor

    torch._dynamo.config.automatic_dynamic_shapes = False  # a graph a bucket
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = 8 * RECOMPILE_LIMIT
    # Sums over tokens fused into the passes over channels read rows that nothing wrote (torch 2.11, H200: the
    # modulation's gradients become NaN wherever the memory held one).
    inductor.triton.mix_order_reduction = False
    for block in transformer.visual_transformer_blocks:
        block.forward = _any_text(torch.compile(block.forward, fullgraph=True, backend=backend))


def _any_text(compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One graph for captions of every length. Marked here: FSDP2's hooks hand a block new tensors without marks."""

    def forward(x_BSM: Tensor, text_BLM: Tensor, *rest: Any) -> Tensor:
        torch._dynamo.maybe_mark_dynamic(text_BLM, 1)
        return compiled(x_BSM, text_BLM, *rest)

    return forward


def offload_blocks(transformer: VideoTransformer, offload: Offload) -> None:
    """What the first blocks keep leaves the GPU; only compiled blocks keep it where it can be seen."""
    blocks = transformer.visual_transformer_blocks
    for number, block in enumerate(blocks):
        block.forward = _offloaded(block.forward, block, offload, number, last=number == len(blocks) - 1)


def _offloaded(
    forward: Callable[..., Tensor], block: nn.Module, offload: Offload, number: int, *, last: bool
) -> Callable[..., Tensor]:
    def run(x_BSM: Tensor, *rest: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(x_BSM, *rest)
        # All blocks share the rest: text, rotations, NABLA's window. Weights are FSDP2's to keep or to gather again.
        shared = {tensor.data_ptr() for tensor in tree_leaves(rest) if isinstance(tensor, Tensor)}
        with offload.block(number, shared | {parameter.data_ptr() for parameter in block.parameters()}):
            out = forward(x_BSM, *rest)
        if last:
            offload.finish_forward()
        return out

    return run


def shard(transformer: VideoTransformer, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """FSDP2 a block and a root, with the modules that stay in fp32 (and are called outside a block) in groups of their
    own.

    A clip's context-parallel workers hold different shards, too: weights are sharded over both axes. Inputs are not
    cast: `cast_forward_inputs` would round the fp32 RoPE tables at every block and make recomputed tensors differ from
    saved ones. Gradients are reduced in fp32.
    """
    shards = mesh["shard", "context"]._flatten("shards")
    fsdp_mesh = mesh["replicate", "shards"] if mesh["replicate"].size() > 1 else shards
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)
    streamed = transformer.stream.parameters if transformer.stream is not None else set()
    for path, module in transformer.named_modules():
        if path.rsplit(".", 1)[-1] in FP32_MODULES and not streamed.issuperset(module.parameters()):
            fully_shard(module, mesh=fsdp_mesh, mp_policy=exact)
    lengths = lengths_of_dora(transformer)
    if lengths:
        fully_shard(lengths, mesh=fsdp_mesh, mp_policy=exact)
    for block in (*transformer.text_transformer_blocks, *transformer.visual_transformer_blocks):
        fully_shard(block, mesh=fsdp_mesh, mp_policy=policy, ignored_params=streamed)
    if transformer.crepa_head is not None:
        fully_shard(transformer.crepa_head, mesh=fsdp_mesh, mp_policy=policy)
    fully_shard(transformer, mesh=fsdp_mesh, mp_policy=policy, ignored_params=streamed)
    if lengths:
        _gather_with_forward(transformer, lengths[0])
    _order_backward(transformer)


def _gather_with_forward(transformer: VideoTransformer, group: nn.Module) -> None:
    """Gather a group that no hook of its own ever will, since its modules are read and not called: DoRA's lengths, fp32
    among a block's bf16. They are few, a number for each row, so all of them are one group, whole from here to the
    backward's end, where FSDP2 reduces the gradients of every group whose turn it did not see.
    """
    assert isinstance(group, FSDPModule)
    # Registered after FSDP2's own hook on the root, which must have run before anything is gathered.
    transformer.register_forward_pre_hook(lambda *_: group.unshard())


def _order_backward(transformer: VideoTransformer) -> None:
    """What a backward gathers ahead, where modulations are frozen.

    FSDP2's own guess is the forward's order turned round. A frozen modulation has no backward: gathered ahead in vain,
    it would stay whole until the end, and keep the next block from being gathered instead.
    """
    if any(p.requires_grad for name, p in transformer.named_parameters() if "modulation" in name):
        return
    backwards = [*transformer.text_transformer_blocks, *transformer.visual_transformer_blocks, transformer][::-1]
    for module, following in pairwise(backwards):
        assert isinstance(module, FSDPModule) and isinstance(following, FSDPModule)
        module.set_modules_to_backward_prefetch([following])


def set_gradient_sync(transformer: nn.Module, *, last: bool, full: bool) -> None:
    """What the coming backward of an accumulated step reduces.

    An adapter's gradients are small: they are summed up whole and reduced with the last micro-batch. Those of all
    weights would fill a GPU (fp32, unsharded): they are reduce-scattered each time, and only HSDP's all-reduce waits.
    """
    assert isinstance(transformer, FSDPModule)
    transformer.set_requires_gradient_sync(last or full)
    if full:
        transformer.set_requires_all_reduce(last)
