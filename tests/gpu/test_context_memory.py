"""What a block of a context-parallel group keeps on a GPU between forward and backward: nothing of its swaps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from k5dist.model.attention import Rope
from k5dist.model.context import ContextGroup
from k5dist.model.dit import VisualBlock
from tests.gpu.test_model import GPU, model_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS, CALLS = 8192, 4


@pytest.fixture
def context() -> Iterator[ContextGroup]:
    """A group of two whose collectives move nothing: one GPU shows what each worker keeps."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield ContextGroup.of(dist.group.WORLD)  # type: ignore[arg-type]
    dist.destroy_process_group()


@pytest.mark.parametrize("recompute", ["full", "attention"])
def test_a_compiled_block_keeps_nothing_of_its_swaps(context: ContextGroup, recompute: str) -> None:
    model = model_config("t2v-lite-sft-5s")
    block = VisualBlock(model).to(GPU, torch.bfloat16).requires_grad_(False)
    block.recompute, block.get_submodule("self_attention").context = recompute, context  # type: ignore[assignment]
    own = TOKENS // context.size
    x = torch.randn(1, own, model.model_dim, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    text = torch.randn(1, 32, model.model_dim, device=GPU, dtype=torch.bfloat16)
    modulation = torch.zeros(1, 9 * model.model_dim, device=GPU)
    rope = Rope(*(torch.zeros(own, model.head_dim // 2, device=GPU) for _ in range(2)))
    compute = torch.compile(block.forward, fullgraph=True)
    outputs = [compute(x, text, modulation, rope, None, TOKENS)]
    before = torch.cuda.memory_allocated()
    outputs += [compute(x, text, modulation, rope, None, TOKENS) for _ in range(CALLS)]
    units = (torch.cuda.memory_allocated() - before) / CALLS / (x.numel() * x.element_size())
    assert units < {"full": 1.2, "attention": 2.3}[recompute], "its output and, where kept, attention's; no more"
