"""What blocks keep, moved to the host and back: the same gradients to the bit, whatever the capacity and the order."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from k5dist.compose import compose, to_run_config
from k5dist.estimate import Recompute
from k5dist.model.dit import VideoTransformer
from k5dist.model.forward import Text, predict_velocity
from k5dist.model.host_memory import HostMemory
from k5dist.train.offload import Offload
from k5dist.train.parallelise import compile_blocks, offload_blocks, set_recompute

CPU = torch.device("cpu")
MODEL = to_run_config(compose(["+flavour=t2v-tiny"])).model


def make_model(recompute: Recompute) -> VideoTransformer:
    torch.manual_seed(0)
    transformer = VideoTransformer(MODEL)
    for name, parameter in transformer.named_parameters():
        if "modulation" in name:
            nn.init.normal_(parameter, std=0.05)
    set_recompute(transformer, recompute)
    compile_blocks(transformer, backend="aot_eager")
    return transformer


def step(transformer: VideoTransformer, seed: int = 1) -> dict[str, Tensor]:
    """The gradients of one clip, which are added to those before."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 3, 8, 12, 16, generator=generator)
    text = Text(
        torch.randn(1, 5, MODEL.in_text_dim, generator=generator),
        torch.randn(1, MODEL.in_text_dim2, generator=generator),
    )
    predict_velocity(transformer, MODEL, latents, False, torch.tensor([300.0]), text).square().sum().backward()
    return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}


def watched(blocks: int, capacity: int = 1 << 30) -> tuple[Offload, list[tuple[str, int]]]:
    """An offload that moves tensors of 1 KiB and more, and the copies it starts."""
    offload, log = Offload(blocks, capacity, CPU, smallest=1 << 10), []
    start, fetch = offload._start_copies, offload._fetch
    offload._start_copies = lambda number: (log.append(("out", number)), start(number))[1]  # type: ignore[method-assign]
    offload._fetch = lambda number, several: (log.append(("back", number)), fetch(number, several))[1]  # type: ignore[method-assign]
    return offload, log


@pytest.mark.parametrize("recompute", [Recompute(0, 0), Recompute(0, 4), Recompute(4, 0), Recompute(1, 2)])
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_gradients_are_the_same_to_the_bit(recompute: Recompute, blocks: int) -> None:
    assert MODEL.num_visual_blocks == 4
    expected = step(make_model(recompute))
    transformer = make_model(recompute)
    offload, log = watched(blocks)
    offload_blocks(transformer, offload)
    found = step(transformer)
    assert found.keys() == expected.keys()
    assert all(map(torch.equal, found.values(), expected.values()))
    # Out in the forward's order; back in the backward's, each once, with the one before asked for ahead.
    assert log == [("out", n) for n in range(blocks)] + [("back", n) for n in reversed(range(blocks))]
    assert all(block.kept and not block.leaving for block in offload.blocks)
    assert all(kept.device is None for block in offload.blocks for kept in block.kept), "nothing stays on the device"
    more = step(transformer, seed=2)  # accumulated: the host's memory is used anew
    step(reference := make_model(recompute))
    assert all(map(torch.equal, more.values(), step(reference, seed=2).values()))


def test_weights_and_what_blocks_share_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = make_model(Recompute(0, 4))
    offload, _ = watched(4)
    offload_blocks(transformer, offload)
    moved: list[Tensor] = []
    pack = offload._pack
    monkeypatch.setattr(
        offload, "_pack", lambda n, t, stay: (kept := pack(n, t, stay), isinstance(kept, Tensor) or moved.append(t))[0]
    )
    step(transformer)
    tokens = 3 * 4 * 6
    assert moved
    moved = [tensor for tensor in moved if tensor.dtype != torch.uint8]  # a generator's state, on CPUs only
    assert {tuple(tensor.shape) for tensor in moved} == {
        (1, tokens, 64),
        (1, 2, tokens, 32),
    }  # inputs, attention's outputs
    assert len(moved) == 2 * 4


def test_what_does_not_fit_stays_on_the_device() -> None:
    expected = step(make_model(Recompute(0, 4)))
    for capacity in (0, 1 << 16, 1 << 18):
        transformer = make_model(Recompute(0, 4))
        offload, _ = watched(4, capacity)
        offload_blocks(transformer, offload)
        found = step(transformer)
        assert all(map(torch.equal, found.values(), expected.values()))
        moved = [len(block.kept) for block in offload.blocks]
        assert sum(map(len, offload.memory.chunks)) <= capacity
        assert (sum(moved) > 0) == (capacity > 0)
    assert moved != sorted(moved, reverse=True) or moved[0] >= moved[-1]


def test_no_gradient_no_offload() -> None:
    transformer = make_model(Recompute(0, 4))
    offload, log = watched(4)
    offload_blocks(transformer, offload)
    with torch.no_grad():
        text = Text(torch.randn(1, 5, MODEL.in_text_dim), torch.randn(1, MODEL.in_text_dim2))
        predict_velocity(transformer, MODEL, torch.randn(1, 3, 8, 12, 16), False, torch.tensor([300.0]), text)
    assert not log


def test_host_memory_is_handed_out_in_pieces_that_do_not_overlap() -> None:
    memory = HostMemory(1 << 16, CPU, chunk=1 << 14)
    shapes = [(1, 30, 64), (3, 7), (5, 100, 8), (1, 1)]
    pieces = [memory.take(torch.empty(shape).transpose(0, -1)) for shape in shapes]
    assert all(piece is not None for piece in pieces)
    spans = sorted((piece.data_ptr(), piece.data_ptr() + piece.numel() * 4) for piece in pieces if piece is not None)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert [piece.shape for piece in pieces if piece is not None] == [shape[::-1] for shape in shapes]
    assert memory.take(torch.empty(1 << 13)) is None, "larger than a chunk"
    first = pieces[0]
    memory.reset()
    again = memory.take(torch.empty(1, 30, 64))
    assert first is not None and again is not None and again.data_ptr() == first.data_ptr()
