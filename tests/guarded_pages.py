"""Runs blocks and a network on tensors that end, or begin, exactly at an unmapped page; tests start it.

Arguments: float32, float64, bfloat16 or int8, or `emulated` for the CUDA kernels, with `all` for the passes of training
on every block with every kind of numbers. Prints each case before it runs, so that the last line names the one that
crashed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable

import torch
from blocks import DENSE, EDGES, Block, network_blocks
from torch import Tensor

import mnv2_fused
from mnv2_fused import ops

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_PAGE = mmap.PAGESIZE
_NO_ACCESS = 0


class Guarded:
    """Memory between two unmapped pages; `place` copies a tensor to its very end or its very beginning."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.mapped: list[tuple[int, int]] = []

    def __enter__(self) -> Guarded:
        return self

    def __exit__(self, *_: object) -> None:
        for address, size in self.mapped:
            _libc.munmap(address, size)

    def place(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.numel() == 0:
            return tensor
        size = tensor.numel() * tensor.element_size()
        inside = -(-size // _PAGE) * _PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = _libc.mmap(None, inside + 2 * _PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        assert address not in (None, ctypes.c_void_p(-1).value), "mmap failed"
        self.mapped.append((address, inside + 2 * _PAGE))
        for guard in (address, address + _PAGE + inside):
            assert _libc.mprotect(guard, _PAGE, _NO_ACCESS) == 0, "mprotect failed"
        start = address + _PAGE + (inside - size if self.at_end else 0)
        flat = torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=tensor.dtype)
        assert flat.data_ptr() == start
        return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def cases() -> list[Block]:
    blocks = network_blocks(32) + [network_blocks(224)[i] for i in (0, 1, 2)]
    for i, width in enumerate(EDGES):
        for j in (i, 2 * i + 3, 5 * i + 1):
            channels = EDGES[j % len(EDGES)], EDGES[(j + 7) % len(EDGES)], EDGES[(j + 12) % len(EDGES)]
            blocks.append(Block(*channels, 1 + i % 4, width, batch=1 + j % 2, stride=1 + j % 2))
            blocks.append(Block(channels[0], channels[0], channels[1], 2, width, expand=False, padding=(0, 2, 1, 1)))
            blocks.append(Block(*channels[:2], channels[0], 3, width, residual=True, project_relu6=True))
            blocks.append(Block(*channels, 5, width + 4, dilation=2, padding=(0, 0, 1, 3)))
    return blocks


def check_block(block: Block, dtype: torch.dtype, at_end: bool, layout: str) -> None:
    tensors = tuple(
        None if t is None else t.contiguous(memory_format=torch.contiguous_format) for t in block.tensors(dtype)
    )
    if layout == "channels_last":
        tensors = (tensors[0].contiguous(memory_format=torch.channels_last), *tensors[1:])
    y = mnv2_fused.inverted_residual(*tensors, **block.options)
    with Guarded(at_end) as memory:
        guarded = mnv2_fused.inverted_residual(*map(memory.place, tensors), **block.options)
    assert torch.equal(y, guarded), "other values beside a guarded page"


def check_network(model: mnv2_fused.MobileNetV2, x: Tensor, at_end: bool) -> None:
    """The whole network; its packed weights end at a guarded page, too."""
    y = model(x)
    packing = model._chain._packing
    with Guarded(at_end) as memory:
        guarded = torch.ops.mnv2_fused.network(memory.place(x), memory.place(packing.packed), packing.plan)
    assert torch.equal(y, guarded), "other values beside a guarded page"


def check_packed_block(block: Block, dtype: torch.dtype, at_end: bool) -> None:
    """A block's packed weights, which the op itself keeps elsewhere."""
    sides = (block.padding,) * 4 if isinstance(block.padding, int) else block.padding
    layer = ops.Layer(
        ops.BLOCK, block.in_channels, block.hidden_channels, block.out_channels, block.stride, block.dilation, *sides,
        int(block.expand), int(block.residual), int(block.project_relu6),
    )  # fmt: skip
    x, *weights = block.tensors(dtype)
    plan = ops.make_plan([layer], dtype)
    with Guarded(at_end) as memory:
        flat = torch.cat([w.flatten() for w in weights if w is not None])
        packed = torch.ops.mnv2_fused.pack(memory.place(flat), plan)
        y = torch.ops.mnv2_fused.network(memory.place(x), memory.place(packed), plan)
    assert torch.equal(y, mnv2_fused.inverted_residual(x, *weights, **block.options)), "the op and its plan differ"


def check_int8() -> None:
    """Blocks of bytes and a network, their packed weights too."""
    import quantized

    def check(layers: list[quantized.QuantizedLayer], x: Tensor) -> None:
        usual = quantized.run(layers, x)
        plan = ops.make_plan([q.layer for q in layers], torch.int8)
        for at_end in (True, False):
            with Guarded(at_end) as memory:
                packed = torch.ops.mnv2_fused.pack(memory.place(torch.cat([q.bytes() for q in layers])), plan)
                y = torch.ops.mnv2_fused.network(memory.place(x), memory.place(packed), plan)
            assert torch.equal(usual, y), "other values beside a guarded page"

    for row in mnv2_fused.kernels():
        if row.dtype == torch.int8 and row.supported:
            os.environ["MNV2_FUSED_KERNEL"] = row.name
            check_int8_row(check)


def check_int8_row(check: Callable[..., None]) -> None:
    import quantized

    for i, block in enumerate(cases()[::9]):
        torch.set_num_threads(3 if i < 3 else 1)
        print(block, flush=True)
        check([quantized.block_layer(block)], quantized.block_input(block))
    stem = quantized.conv_layer(3, 12, 2, (1, 1, 1, 1))
    ends = [[quantized.pool_layer(12)], [quantized.pointwise_layer(12, 37), quantized.pool_layer(37)]]
    ends += [[quantized.pool_layer(12), quantized.linear_layer(12, 21)]]
    for height, width in ((1, 1), (5, 2), (33, 31), (20, 48)):
        for layers in ([stem, *end] for end in ends):
            for x in (torch.randn(2, 3, height, width), torch.randn(2, height, width, 3).permute(0, 3, 1, 2)):
                print(layers[-1].layer, x.shape, x.stride(), flush=True)
                check(layers, x)


def check_emulated(all_pairs: bool) -> None:
    import emulation

    torch.set_num_threads(1)
    torch.ops.load_library(emulation.build())
    op = torch.ops.mnv2_emulated.inverted_residual
    for i, block in enumerate(cases()[20::10]):
        sides = (block.padding,) * 4 if isinstance(block.padding, int) else block.padding
        kinds = ((torch.float16, False), (torch.bfloat16, False), (torch.float32, True), (torch.float32, False))
        for kind, (dtype, tf32) in enumerate(kinds):
            tensors = [None if t is None else t.contiguous().to(dtype) for t in block.tensors()]
            tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
            options = block.stride, block.dilation, sides, block.residual, block.project_relu6, tf32
            usual = op(*tensors, *options)
            for at_end in (True, False):
                print(block, dtype, tf32, at_end, flush=True)
                with Guarded(at_end) as memory:
                    assert torch.equal(usual, op(*map(memory.place, tensors), *options))
            if i % 2 == 0 and (all_pairs or (i // 2 + kind) % 2 == 0):
                check_training(torch.ops.mnv2_emulated, tensors, options)


def check_training(run: object, tensors: list[Tensor | None], options: tuple[object, ...]) -> None:
    """The passes over pixels, on the same block, by the ops of a library."""
    x, we, be, wd, _, wp, _ = tensors
    (*geometry, _, _, tf32), hidden = options, wd.shape[0]
    z = run.inverted_residual(*tensors, *geometry, False, False, tf32)
    wide = torch.promote_types(x.dtype, torch.float32)
    table, rows = torch.rand(6, hidden, dtype=wide), torch.rand(6, x.shape[1], dtype=wide)
    calls = (
        (run.moments, (x,), (tf32,)),
        (run.channel_moments, (x,), ()),
        (run.channel_products, (x, x.clone(), rows[0].clone(), rows[1:3].clone()), ()),
        (run.affine, (x, x.clone(), rows[3:].clone(), None), (False,)),
        (run.filter_moments, (x, we, be, wd), (*geometry, tf32)),
        (run.block_gradients, (z, x, we, be, wd, wp, table), (*geometry, 31, tf32)),
    )
    for op, given, rest in calls:
        usual = op(*given, *rest)
        for at_end in (True, False):
            print(op, at_end, flush=True)
            with Guarded(at_end) as memory:
                guarded = op(*map(memory.place, given), *rest)
                pairs = zip(usual, guarded, strict=True) if isinstance(usual, tuple) else [(usual, guarded)]
                assert all(torch.equal(a, b) for a, b in pairs), op


def main() -> None:
    if sys.argv[1] == "emulated":
        return check_emulated(sys.argv[2:] == ["all"])
    if sys.argv[1] == "int8":
        check_int8()
        return print("done", flush=True)
    dtype = getattr(torch, sys.argv[1])
    for i, block in enumerate(cases()):
        torch.set_num_threads(3 if i < 20 else 1)  # the first are those of a network, some of which threads share
        for at_end in (True, False):
            for layout in DENSE:
                print(block, at_end, layout, flush=True)
                check_block(block, dtype, at_end, layout)
            print(block, at_end, "packed", flush=True)
            check_packed_block(block, dtype, at_end)
        if i % 6 == 0:
            tensors = [None if t is None else t.contiguous() for t in block.tensors(dtype)]
            tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
            sides = (block.padding,) * 4 if isinstance(block.padding, int) else block.padding
            print(block, "training", flush=True)
            check_training(torch.ops.mnv2_fused, tensors, (block.stride, block.dilation, sides, False, False, False))
    torch.manual_seed(0)
    setting = [(1, 5, 1, 1), (6, 7, 2, 2), (3, 9, 1, 2)]
    with torch.inference_mode():
        for options in (dict(num_classes=11), dict(num_classes=0, inverted_residual_setting=setting, round_nearest=1)):
            model = mnv2_fused.MobileNetV2(width_mult=0.35, **options).to(dtype).eval()
            for shape in ((1, 3, 33, 31), (3, 3, 32, 48), (1, 3, 1, 1), (2, 3, 5, 2)):
                for x in (
                    torch.randn(shape, dtype=dtype),
                    torch.randn(*shape[:1], *shape[2:], 3, dtype=dtype).permute(0, 3, 1, 2),
                ):
                    for at_end in (True, False):
                        print(options, shape, x.stride(), at_end, flush=True)
                        check_network(model, x, at_end)
    print("done", flush=True)


if __name__ == "__main__":
    main()
