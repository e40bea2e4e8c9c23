"""Two or three gloo ranks of tests/python/test_parallel.py, which starts this file with a rank, their number and a port."""

import copy
import sys

import torch
import torch.distributed as dist
import xorz
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from xorz import XorzColwiseParallel, XorzRowwiseParallel


class Block(nn.Module):
    def __init__(self, k, hidden, n):
        super().__init__()
        self.up, self.down = nn.Linear(k, hidden), nn.Linear(hidden, n)

    def forward(self, x):
        return self.down(torch.nn.functional.gelu(self.up(x)))


def tuned_block(k, hidden, n, dtype, mode, seed=0):
    """(the plain fine-tuned block, the same of XorDeltaLinear layers)."""
    torch.manual_seed(seed)
    base = Block(k, hidden, n).to(dtype)
    plain = copy.deepcopy(base)
    for w in plain.parameters():
        w.data = (w.data.float() + 0.03 * (torch.rand(w.shape) < 0.2) * torch.randn(w.shape)).to(dtype)
    ours = copy.deepcopy(base)
    for name in ("up", "down"):
        layer, tuned = getattr(base, name), getattr(plain, name)
        delta = xorz.delta_encode(layer.weight.detach(), tuned.weight.detach())
        bias = tuned.bias.detach().clone().requires_grad_()
        setattr(ours, name, xorz.XorDeltaLinear.from_linear(layer, delta, bias=nn.Parameter(bias), mode=mode))
    return plain, ours


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_block(mesh, rank, world):
    plan = {"up": XorzColwiseParallel(), "down": XorzRowwiseParallel()}
    for k, hidden, n in ((64, 96, 40), (33, 50, 7), (16, world - 1, 5)):
        for dtype in (torch.float32, torch.bfloat16):
            plain, ours = tuned_block(k, hidden, n, dtype, "deterministic")
            whole = copy.deepcopy(ours)
            words = sum(layer.weight_bits.numel() for layer in (ours.up, ours.down))
            parallelize_module(ours, mesh, plan)
            kept = sum(layer.weight_bits.numel() for layer in (ours.up, ours.down))
            assert kept <= -(-words // world) + max(k, n) * 2, (kept, words)
            for layer in (ours.up, ours.down):
                layer.check_base()
                held = layer.weight_bits.untyped_storage().nbytes()
                assert held == layer.weight_bits.numel() * layer.weight_bits.element_size()
            x = torch.randn(3, 5, k, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
            y = x.detach().clone().requires_grad_()
            got, want = ours(x), plain(y)
            # Against float64, with the roundings that R partial sums have.
            exact = copy.deepcopy(plain).double()(x.detach().double())
            unit = torch.finfo(dtype).eps
            near = unit * (world + 3) * (1 + exact.abs().max()) * 4
            assert (got.double() - exact).abs().max() <= near, (
                dtype,
                k,
                (got.double() - exact).abs().max(),
                near,
            )
            assert (want.double() - exact).abs().max() <= near
            # Some outputs of a column-wise layer are the bits that one rank gives them.
            up, alone = ours.up(x), whole.up(x)
            start = min(hidden, -(-hidden // world) * rank)
            assert same(up, alone[..., start : start + up.size(-1)])
            seed = torch.randn(got.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
            got.backward(seed)
            want.backward(seed)
            size = y.grad.abs().max().double()
            assert (x.grad.double() - y.grad.double()).abs().max() <= unit * 32 * (1 + size), dtype
            down = (ours.down.total_bias.grad.double() - plain.down.bias.grad.double()).abs().max()
            assert down <= unit * 32 * (1 + plain.down.bias.grad.abs().max())
            every = [torch.empty_like(got) for _ in range(world)]
            dist.all_gather(every, got.detach())
            assert all(same(other, got.detach()) for other in every)


def check_layouts(mesh, rank, world):
    plain, ours = tuned_block(64, 96, 48, torch.float32, "deterministic")
    whole = copy.deepcopy(ours)
    rows = torch.randn(2 * world, 64, generator=torch.Generator().manual_seed(3))
    mine = rows[2 * rank : 2 * rank + 2]
    # Sequence parallelism: rows are cut before and after, whole inside.
    plan = {
        "up": XorzColwiseParallel(input_layouts=Shard(0)),
        "down": XorzRowwiseParallel(output_layouts=Shard(0), use_local_output=False),
    }
    parallelize_module(ours, mesh, plan)
    with torch.no_grad():
        got = ours(mine)
        assert isinstance(got, DTensor) and got.placements == (Shard(0),) and got.shape == (2 * world, 48)
        want = plain(rows)
        assert torch.allclose(got.to_local(), want[2 * rank : 2 * rank + 2], atol=1e-5)
        assert torch.allclose(got.full_tensor(), want, atol=1e-5)
    gathered = XorzColwiseParallel(output_layouts=Replicate())
    layer = parallelize_module(whole, mesh, {"up": gathered}).up
    plain_up = tuned_block(64, 96, 48, torch.float32, "deterministic")[1].up
    with torch.no_grad():
        assert same(layer(rows), plain_up(rows))
    given = DTensor.from_local(rows, mesh, [Replicate()])
    with torch.no_grad():
        assert same(layer(given), plain_up(rows))


def refused(error, text, call):
    try:
        call()
    except error as found:
        assert text in str(found), found
        return
    raise AssertionError(f"not refused: {text}")


def check_refusals(mesh, rank, world):
    plain, ours = tuned_block(64, 96, 48, torch.float32, "fast")
    refused(TypeError, "is for XorDeltaLinear, but the module is a Linear",
            lambda: parallelize_module(plain, mesh, {"up": XorzColwiseParallel()}))  # fmt: skip
    parallelize_module(ours, mesh, {"up": XorzColwiseParallel()})
    refused(ValueError, "was cut already, from [96, 64]",
            lambda: parallelize_module(ours, mesh, {"up": XorzRowwiseParallel()}))  # fmt: skip
    _, ours = tuned_block(64, 96, 48, torch.float32, "fast")
    ours.up.weight_bits[0, 0] += 1
    refused(RuntimeError, "digest", lambda: parallelize_module(ours, mesh, {"up": XorzColwiseParallel()}))
    # torch's own styles and FSDP2 replace the parameters of an attached model.
    for how in (lambda m: parallelize_module(m, mesh, {"up": ColwiseParallel()}), fsdp(mesh)):
        tuned, _ = tuned_block(64, 96, 48, torch.float32, "fast")
        torch.manual_seed(0)
        model = Block(64, 96, 48)
        delta = xorz.diff(model, tuned)
        tenants = xorz.attach(model)
        tenants.load("alice", delta)
        rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(5))
        how(model)

        def use(model=model, tenants=tenants, rows=rows):
            with torch.no_grad(), tenants.use("alice"):
                model(rows)

        refused(RuntimeError, "`up.weight` of the attached model was replaced or removed", use)


def fsdp(mesh):
    from torch.distributed.fsdp import fully_shard

    return lambda model: fully_shard(model, mesh=mesh)


def check_fsdp(mesh, rank, world):
    """Base and delta are buffers, which FSDP2 leaves whole on each rank; the bias it shards. The product is the fine-tune's."""
    plain, ours = tuned_block(64, 96, 48, torch.float32, "fast")
    fsdp(mesh)(ours)
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(6))
    assert torch.allclose(ours(rows), plain(rows), atol=1e-5)


def main(rank, world, port):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    for check in (check_block, check_layouts, check_refusals, check_fsdp):
        check(mesh, rank, world)
        dist.barrier()
    dist.destroy_process_group()
    print("ok")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
