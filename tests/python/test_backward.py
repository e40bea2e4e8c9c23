"""Promise: a backward pass uses the tenants of its forward, recomputed or not, or raises where they are gone."""

import gc

import pytest
import torch
import xorz
from small import close, fine_tuned, make_base, served
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def checkpointed(model, ids, **options):
    """Small.forward with each block recomputed in the backward pass; gives the gradient at the blocks' input."""
    x = model.embed(ids).detach().requires_grad_()
    y = x
    for block in model.blocks:
        y = checkpoint(block, y, use_reentrant=False, **options) if options.pop("on", True) else block(y)
    return x, model.head(model.norm(y)).square().sum()


def test_gradient_checkpointing_carries_its_tenants_or_raises():
    base, tenants, ids, _ = served()
    names = ["a", None, "b"]
    with tenants.use(names):
        x, loss = checkpointed(base, ids, on=False)
        loss.backward()
        plain = x.grad
        x, loss = checkpointed(base, ids, context_fn=tenants.carry)
    # After the `use`, and with another one open.
    with tenants.use("b"):
        loss.backward()
    assert torch.equal(x.grad, plain)
    for i, name in enumerate(names):
        with tenants.use(name):
            x, loss = checkpointed(base, ids[i : i + 1], context_fn=tenants.carry)
        loss.backward()
        assert close(x.grad, plain[i : i + 1])
    assert not close(plain[0], plain[2])
    with tenants.use(names):
        x, loss = checkpointed(base, ids)
        with pytest.raises(RuntimeError, match=r"context_fn=tenants\.carry"):
            loss.backward()
    del loss, x
    # What a graph carries stays until the graph is gone.
    with tenants.use("a"):
        x, loss = checkpointed(base, ids, context_fn=tenants.carry)
    tenants.unload("a")
    assert len(tenants._slots) == 2
    loss.backward()
    del loss, x
    gc.collect()
    assert len(tenants._slots) == 1


def test_a_backward_pass_whose_tenant_is_gone_is_an_error():
    base, tenants, ids, _ = served()
    with tenants.use(["a", None, "b"]):
        _, loss = checkpointed(base, ids, on=False)
    loss.backward(retain_graph=True)
    tenants.unload("a")
    with pytest.raises(RuntimeError, match="resident delta"):
        loss.backward(retain_graph=True)
    tenants.load("c", xorz.diff(base, fine_tuned(make_base(), 3)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(retain_graph=True)
