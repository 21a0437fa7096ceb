"""TREAD through the kernels and the compiler on a GPU: against fp32 on the plain path, and without new graphs."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from k5dist.config import Route
from k5dist.estimate import Recompute
from k5dist.model.dit import VideoTransformer
from k5dist.model.forward import Text, predict_velocity
from k5dist.model.tread import Routing
from k5dist.train.parallelise import compile_blocks, set_recompute
from tests.gpu.test_model import GPU, in_bf16, model_config, relative, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("flavour", ["t2v-lite-sft-5s", "t2v-pro-sft-5s-hd", "t2v-lite-sft-10s"])
def test_routed_blocks_run_through_the_kernels(flavour: str) -> None:
    """Sparse kernels (head_dim 64 and 128) and dense ones: outputs and gradients near fp32's, one graph a length."""
    model = model_config(flavour, num_visual_blocks=4)
    state = weights(model)
    exact, ours = VideoTransformer(model).to(GPU), VideoTransformer(model)
    exact.load_state_dict(state)
    ours.load_state_dict(state)
    in_bf16(ours)
    set_recompute(ours, Recompute(1, 2))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compile_blocks(ours, backend=counter)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 5, 32, 48, 16, generator=generator).to(GPU)
    time = torch.tensor([500.0], device=GPU)
    counts = []
    for seed in range(3):
        routing = Routing((Route(1, 2, 0.5),), seed, False)
        qwen = torch.randn(1, 20 + seed, model.in_text_dim, generator=generator)
        text = Text(qwen, torch.randn(1, model.in_text_dim2, generator=generator))
        out, grads = [], []
        for transformer, dtype in ((exact, torch.float32), (ours, torch.bfloat16)):
            noisy = latents.to(dtype, copy=True).requires_grad_()  # leaves of their own, in fp32 as well
            velocity = predict_velocity(transformer, model, noisy, False, time, text.to(GPU, dtype), routing)
            velocity.float().square().mean().backward()
            assert noisy.grad is not None
            out.append(velocity.detach().float())
            grads.append(noisy.grad.float())
        errors = {"velocity": relative(out[1], out[0]), "gradient": relative(grads[1], grads[0])}
        assert errors["velocity"] < 5e-2, errors
        # Each makes its own map: a block near the threshold that one keeps and the other does not costs gradients most.
        assert errors["gradient"] < (0.1 if model.is_sparse else 5e-2), errors
        with torch.no_grad():
            whole = predict_velocity(exact, model, latents, False, time, text.to(GPU, torch.float32))
        assert relative(whole, out[0]) > 1e-3, "some tokens did skip"
        counts.append(counter.frame_count)
    assert counts[1] == counts[2], f"another draw is no new graph: {counts}"
