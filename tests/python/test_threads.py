"""Promise: threads and tasks have the tenants they are given and no others, for as long as the `use` lasts;
what a running forward reads stays as it is.
"""

import asyncio
import contextvars
import threading

import pytest
import torch
import xorz
from small import close, fine_tuned, in_thread, make_base, served, use_and_call

pytestmark = pytest.mark.usefixtures("one_thread")


def test_another_load_in_the_midst_of_a_forward_changes_nothing_in_it():
    """Two threads, made one: the second one's load happens exactly between two steps of the first one's forward."""
    base, tenants, ids, want = served()
    plain = make_base()
    others = {f"n{i}": fine_tuned(plain, 10 + i) for i in range(12)}
    deltas = {name: xorz.diff(plain, model) for name, model in others.items()}
    left = list(deltas)

    class Interrupted(dict):
        def items(self):
            found = list(super().items())
            count = 1 if len(left) > 8 else len(left)
            # One at first; then so many that the tables of slots must grow.
            for name in [left.pop(0) for _ in range(count)]:
                tenants.load(name, deltas[name])
            return found

    sites = [
        s for s in tenants.sites.values() if s.kind == "linear" and s.name.endswith(("qkv", "down", "head"))
    ]
    for site in sites:
        site.values = Interrupted(site.values)
    while left:
        for site in sites:
            site._biases = None
        with torch.no_grad(), tenants.use(["a", None, "b"]):
            y = base(ids)
        assert all(close(y[i], want[n][i]) for i, n in enumerate(["a", None, "b"]))
    for name, model in others.items():
        with torch.no_grad(), tenants.use([None, name, "a"]):
            y = base(ids)
        with torch.no_grad():
            assert close(y[1], model(ids)[1]) and close(y[0], want[None][0]) and close(y[2], want["a"][2]), (
                name
            )


def test_tasks_of_asyncio_have_each_their_own_tenants():
    base, tenants, ids, want = served()

    async def task(i):
        name = ("a", "b", None)[i % 3]
        for _ in range(4):
            with tenants.use(name):
                await asyncio.sleep(0.001 * (i % 4))
                with torch.no_grad():
                    y = base(ids)
                # A task started inside has them, too.
                z = await asyncio.create_task(child())
                await asyncio.sleep(0)
            assert close(y, want[name]) and torch.equal(y, z)
            with pytest.raises(RuntimeError, match="no tenant is active"):
                base(ids)
        return name

    async def child():
        await asyncio.sleep(0.001)
        with torch.no_grad():
            return base(ids)

    async def outlive():
        with tenants.use("a"):
            late = asyncio.create_task(child())
        with pytest.raises(RuntimeError, match="the use of 'a' has ended"):
            await late

    async def main():
        done = await asyncio.gather(*(task(i) for i in range(12)))
        assert len(done) == 12
        await outlive()

    asyncio.run(main())


def test_threads_have_the_tenants_they_are_given_and_no_others():
    base, tenants, ids, want = served()
    with torch.no_grad(), tenants.use("a"):
        lost = in_thread(lambda: base(ids))
        assert isinstance(lost, RuntimeError) and "no tenant is active" in str(lost)
        context = contextvars.copy_context()
        got = in_thread(lambda: context.run(base, ids))
        assert close(got, want["a"])
        with tenants.use("b"):
            inner = contextvars.copy_context()
            # The thread's own `use` does not reach anybody else.
            both = in_thread(lambda: inner.run(lambda: (base(ids), use_and_call(tenants, None, ids))))
            assert close(both[0], want["b"]) and close(both[1], want[None])
        assert close(base(ids), want["a"])


def test_a_use_that_ends_under_a_running_thread_is_an_error_there_and_never_another_tenant():
    base, tenants, ids, _ = served()
    inside, go = threading.Event(), threading.Event()

    def stop(*_):
        inside.set()
        assert go.wait(30)

    hook = base.blocks[0].gate.register_forward_pre_hook(stop)
    out = []
    with torch.no_grad(), tenants.use(["a", "b", "a"]):
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: out.append(in_thread(lambda: context.run(base, ids))))
        thread.start()
        assert inside.wait(30)
    for name in "ab":
        tenants.unload(name)
    assert tenants.memory()["deltas"] == 0
    # Their places go to others at once.
    tenants.load("c", xorz.diff(base, fine_tuned(make_base(), 3)))
    go.set()
    thread.join()
    hook.remove()
    assert isinstance(out[0], RuntimeError) and "the use of 'a', 'b' has ended" in str(out[0]), out


def test_what_a_running_product_reads_is_not_given_away():
    _, tenants, _, _ = served()
    with tenants.use(["a", "b"]):
        rows = tenants.active.get()
        rows.begin()  # as a module does when it is called
    for name in "ab":
        tenants.unload(name)
    assert tenants.memory()["deltas"] > 0 and len(tenants._slots) == 2
    rows.end()
    assert tenants.memory()["deltas"] == 0 and not tenants._slots
    with pytest.raises(RuntimeError, match="has ended"):
        rows.begin()
