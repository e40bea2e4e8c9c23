"""Promise: generators that are stepped in turn have each their own tenant, or there is an error; a `use` is
open once at a time."""

import asyncio
import contextvars

import pytest
import torch
from cases import Case
from torch import nn


def test_two_streams_stepped_in_turn_have_each_their_tenant_or_an_error():
    torch.manual_seed(0)
    case, x = Case(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4)

    def stream(name):
        with case.tenants.use(name):
            while True:
                yield case.model(x)

    with torch.no_grad():
        one, two = stream("a"), stream("b")
        assert torch.allclose(next(one), case.plain["a"](x), atol=1e-5)
        with pytest.raises(RuntimeError, match=r"tenants.stream"):
            case.model(x)  # not in the generator, whose tenant has leaked out of it
        assert torch.allclose(next(two), case.plain["b"](x), atol=1e-5)
        with pytest.raises(RuntimeError, match=r"tenants.stream"):
            next(one)
        two.close()
        # Nothing is left behind.
        with pytest.raises(RuntimeError, match="no tenant is active"):
            case.model(x)
        assert all(t.pins == 0 for t in case.tenants._slots.values())


def test_a_stream_stepped_in_copies_of_its_context_raises_at_its_first_wrong_step():
    torch.manual_seed(0)
    case, x = Case(nn.Sequential(nn.Linear(4, 4)), default="base"), torch.randn(2, 4)

    def stream(name):
        with case.tenants.use(name):
            while True:
                yield case.model(x)

    with torch.no_grad():
        steps = stream("a")
        step = lambda: contextvars.copy_context().run(next, steps)  # noqa: E731
        assert torch.allclose(step(), case.plain["a"](x), atol=1e-5)
        with pytest.raises(RuntimeError, match=r"tenants.stream"):
            step()
        other = stream("b")
        contextvars.copy_context().run(next, other)
        other.close()
        assert torch.allclose(case.model(x), case.base(x)) and not case.tenants.generators


def test_streams_are_stepped_by_tenants_stream():
    torch.manual_seed(0)
    case, x = Case(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4)

    def outputs(count=3):
        for _ in range(count):
            yield case.model(x)

    async def outputs_later(count=3):
        for _ in range(count):
            await asyncio.sleep(0)
            yield case.model(x)

    async def both():
        streams = {n: case.tenants.stream(n, outputs_later()) for n in "ab"}
        for _ in range(3):
            for name, stream in streams.items():
                assert torch.allclose(await anext(stream), case.plain[name](x), atol=1e-5)
        for stream in streams.values():
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    with torch.no_grad():
        streams = {n: case.tenants.stream(n, outputs()) for n in "ab"}
        for _ in range(3):
            for name, stream in streams.items():
                assert torch.allclose(
                    contextvars.copy_context().run(next, stream), case.plain[name](x), atol=1e-5
                )
        assert [list(s) for s in streams.values()] == [[], []]
        with pytest.raises(RuntimeError, match="no tenant is active"):
            case.model(x)
        asyncio.run(both())
    for bad in (5, object()):
        with pytest.raises(TypeError, match="iterator"):
            case.tenants.stream("a", bad)


def test_a_use_inside_of_one_step_of_a_generator_is_right():
    case, x = Case(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4)

    def steps(name):
        for _ in range(2):
            with case.tenants.use(name):
                y = case.model(x)
            yield y

    with torch.no_grad():
        for got in zip(steps("a"), steps("b"), strict=True):
            for name, y in zip("ab", got, strict=True):
                assert torch.allclose(y, case.plain[name](x), atol=1e-5)


def test_a_context_of_ones_own_may_open_a_use():
    from contextlib import ExitStack, contextmanager

    case, x = Case(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4)

    @contextmanager
    def serving(name):
        with case.tenants.use(name):
            yield

    with torch.no_grad(), serving("a"):
        assert torch.allclose(case.model(x), case.plain["a"](x), atol=1e-5)
        with ExitStack() as stack:
            stack.enter_context(serving("b"))
            assert torch.allclose(case.model(x), case.plain["b"](x), atol=1e-5)
        assert torch.allclose(case.model(x), case.plain["a"](x), atol=1e-5)


def test_one_use_is_entered_once_at_a_time():
    case = Case(nn.Sequential(nn.Linear(4, 4)))
    use = case.tenants.use("a")
    with use, pytest.raises(RuntimeError, match="open already"), use:
        pass
    with use:
        pass
    assert all(t.pins == 0 for t in case.tenants._slots.values())
