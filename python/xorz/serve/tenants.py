"""The fine-tunes of an attached model: loaded and unloaded under traffic, active where `use` says so, kept in a budget.

Forwards never wait for a load: a tenant's deltas are read and checked first and appear at once, its slot is given to nobody
else while a `use` or a forward holds it. Tables that forwards read are replaced, not changed; on a device, where graphs read
them again, an entry is changed in its place while nobody can name its slot (`fixed`).
"""

import itertools
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..sources import located
from . import roots, swap
from .graphs import GraphRows
from .guard import Guard
from .kept import kept
from .prepare import Prepared, prepare
from .proof import Proofs
from .residency import Piece, Residency, padded, size_of
from .rows import BASE, HOST, Active, RowMap, Unknown, Use, lasting, stepping
from .shown import Memory, Summary, table
from .site import Site
from .streams import LaterStream, Stream
from .verify import verify
from .watch import Watch
from .weight import plain

Source = Any  # where a package is, a StateDelta, or name -> resident delta


class _Tenant:
    """One name: where it came from, and, while it is resident, its slot and what it holds there."""

    def __init__(self, name: str, source: Source) -> None:
        self.name, self.source = name, source
        # Read again wherever the process has gone to by then.
        self.path = located(source).absolute() if isinstance(source, (str, os.PathLike)) else None
        self.identity: Any = None
        self.slot: int | None = None
        # By device, as are the bytes of all of it and of copies alone.
        self.pieces: dict[torch.device, list[Piece]] = {}
        self.bytes: dict[torch.device, int] = {}
        self.copies: dict[torch.device, int] = {}
        self.alone = False
        self.pins = 0
        self.last = 0
        self.gone = False
        self.loading = threading.Lock()


class Tenants:
    """Made by `attach`. Every method may be called from any thread.

    Attributes:
        model: the attached model.
        default: "base", a tenant's name, or None where having no active tenant is an error.
        mode: of every product.
        devices: where the model is: the host, or one or several GPUs, if `is_spread`. arenas: of deltas, one on each.
    """

    def __init__(
        self,
        model: nn.Module,
        default: str | None,
        mode: str,
        prefer: str | None,
        budget: int | str | None,
        max_copies: int | str | None = None,
        trust: str = "digest",
        shares: Mapping[torch.device, float] | None = None,
    ) -> None:
        """Attach `model`, for which `xorz.attach` is the door; the arguments are those of `attach`, and where the model is,
        with the share of the budget that is for each place.
        """
        if default is not None and not (isinstance(default, str) and default):
            raise ValueError(f'default must be "base", a tenant\'s name or None, but is {default!r}')
        if mode not in ("fast", "deterministic", "exact"):
            raise ValueError(f"mode must be one of fast, deterministic, exact, but is {mode!r}")
        if prefer not in (None, "auto", "speed", "memory"):
            raise ValueError(f'prefer must be "auto", "speed", "memory" or None, but is {prefer!r}')
        if trust not in ("digest", "sha256"):
            raise ValueError(f'trust must be "digest" or "sha256", but is {trust!r}')
        self.model, self.default, self.mode, self.prefer = model, default, mode, prefer
        self.trust = trust
        self.budget = size_of(budget)
        self.max_copies = size_of(max_copies, "max_copies")
        self.lock = Guard(self._let_go)
        self.active = Active()
        self.capacity = 4
        self.sites: dict[str, Site] = {}
        self.modules: dict[str, nn.Module] = {}
        self.methods: list[nn.Module] = []
        shares = shares or {HOST: 1.0}
        self.devices = tuple(shares)
        self.is_spread = len(self.devices) > 1
        self.residencies = {
            device: Residency(None if self.budget is None else max(1, int(share * self.budget)), device)
            for device, share in shares.items()
        }
        self.arenas = {device: residency.arena for device, residency in self.residencies.items()}
        self._tenants: dict[str, _Tenant] = {}
        self._slots: dict[int, _Tenant] = {}
        self._clock = itertools.count(1)
        self.graphs: list[GraphRows] = []
        # Something on the device is to be changed, or was made by a forward: the next load waits for the device first.
        self.unsettled = False
        self._detached = False
        self.example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.apart: RuntimeError | None = None
        self.cut: dict[Any, list[bool]] = {}
        self.proofs = Proofs()
        self.of_base = RowMap((BASE,), (None,), device=self.devices[0])
        self.generators: dict[int, RowMap] = {}
        self._shrouded: list[Tensor] = []
        self._kept: dict[str, str] = {}
        self._watch = Watch(model)
        self._dense: dict[str, list[int]] = {}

    def begin(self) -> None:
        """For `attach`, once every module is: from now on nobody reads the base past the tenants."""
        self._kept = kept(self.model)
        self._shrouded = swap.shroud([(site, self.modules[name]) for name, site in self.sites.items()])
        self._watch.begin(self.sites, self.modules)

    def count_dense(self, name: str, size: int) -> None:
        """A dense value of a tenant's tensor was made for one call."""
        found = self._dense.setdefault(name, [0, 0])
        found[0] += 1
        found[1] = size

    def suspect(self, reader: nn.Module) -> None:
        """A module read a weight that is another one's: it must not keep what it makes of it."""
        self._watch.suspect(reader)

    def enclose(self, name: str, module: nn.Module) -> None:
        """From now on a module is run once per tenant in batches of which it was proven that it can be; see `enclosing`."""
        with self.lock:
            if "_xorz_whole" not in module.__dict__ and not self._detached:
                self.methods.append(module)
                roots.swap_whole(module, self, name)

    @property
    def serves_by_default(self) -> bool:
        """Whether the model's own calls are a tenant's where none is active."""
        return self.default not in (None, "base")

    # Loading.

    def load(self, name: str, source: Source) -> None:
        """Load a fine-tune under a name.

        Args:
            name: any string that is not in use.
            source: a package: its path, a folder with one, a repository of the Hub or an address of fsspec (`sources.located`);
                a `StateDelta` of `xorz.diff(base, fine_tuned)`; or name -> resident delta.

        Raises:
            ValueError: the name is taken, the package is damaged or of another base (tensor and both digests are named), or
                it changes what nothing here can serve (named); KeyError: the model lacks a tensor; MemoryError: the budget
                is full of tenants that cannot make room; OSError.
        """
        self._check(name)
        tenant = _Tenant(name, source)
        with self.lock:
            if name in self._tenants:
                raise ValueError(f"tenant {name!r} is loaded already; unload it, or swap it for another")
        prepared = self._prepare(tenant)
        with self.lock:
            self._check(name)
            if name in self._tenants:
                raise ValueError(f"tenant {name!r} is loaded already; unload it, or swap it for another")
            self._place(tenant, prepared)
            self._tenants[name] = tenant
        if self.example is not None:
            self._try(tenant)

    def _try(self, tenant: _Tenant) -> None:
        """Refuse now what the first client would find out."""
        args, kwargs = self.example
        try:
            self.verify(tenant.name, *args, **kwargs)
        except BaseException as error:
            with self.lock:
                if self._tenants.get(tenant.name) is tenant:
                    self.unload(tenant.name)
            if isinstance(error, RuntimeError):
                raise ValueError(f"tenant {tenant.name!r} cannot be served: {error}") from error
            raise

    def verify(self, name: str, *inputs: Any, **named: Any) -> None:
        """Compare what the attached model computes for a tenant with its dense weights, on inputs of your own.

        `model(*inputs, **named)` is run for the tenant alone, where each attached module is compared with the same module of
        dense weights (one module's at a time), for the base, and, if the first input has two rows or more, for a batch in which
        the tenant and the base alternate, whose rows must be what they are alone.

        Raises:
            ValueError: a module differs, which is named, as is by how much; KeyError: no such tenant; RuntimeError: what was
                given, or a batch of several tenants, cannot be served.
        """
        with self.lock:
            self._find(name)
        verify(self.model, self.modules, name, self.use, inputs, named)

    def swap(self, name: str, source: Source) -> None:
        """Put another fine-tune under a loaded name, at once; forwards that run keep the old one. Errors as `load`."""
        self._check(name)
        fresh = _Tenant(name, source)
        prepared = self._prepare(fresh)
        with self.lock:
            old = self._find(name)
            self._place(fresh, prepared, old)
            self._tenants[name] = fresh
            self._forget(old)

    def unload(self, name: str) -> None:
        """Forget a tenant; its memory is free when no `use` holds it. KeyError if there is none of that name."""
        with self.lock:
            tenant = self._find(name)
            del self._tenants[name]
            self._forget(tenant)

    def names(self) -> list[str]:
        """All loaded tenants, those evicted to their files included."""
        with self.lock:
            return list(self._tenants)

    def resident(self, name: str) -> bool:
        """Whether the tenant is in memory; False if it was evicted to its file. KeyError if there is none."""
        with self.lock:
            return self._find(name).slot is not None

    def _prepare(self, tenant: _Tenant) -> Prepared:
        before = None if tenant.path is None else _identity(tenant.path)
        if tenant.identity is not None and before != tenant.identity:
            raise ValueError(
                f"tenant {tenant.name!r}: {tenant.path} has changed since it was loaded; swap or unload it"
            )
        with lasting():
            source = tenant.source if tenant.path is None else tenant.path
            prepared = prepare(self.model, source, self.prefer, self.max_copies, self._kept, self.trust)
            prepared.move()
        if tenant.path is not None and _identity(tenant.path) != before:
            raise ValueError(f"tenant {tenant.name!r}: {tenant.path} was changed while it was read")
        tenant.identity = before
        return prepared

    def _place(self, tenant: _Tenant, prepared: Prepared, old: _Tenant | None = None) -> None:
        """Make a prepared tenant resident, in the place of `old`; nothing is left behind if that fails."""
        self._make_room(tenant, prepared, old)
        slot = self._free_slot(tenant)
        # What was seen of the tenant that had the slot before is not this one's.
        self.cut.clear()
        tenant.slot, tenant.alone, tenant.last = slot, prepared.alone, next(self._clock)
        self._slots[slot] = tenant
        try:
            placed: dict[Any, Piece] = {}
            for device, residency in self.residencies.items():
                # Tied parameters have one delta.
                once = {id(delta): delta for site, _, delta in prepared.deltas if site.device == device}
                pieces = residency.place(once.values(), lambda: self._evict_one(tenant))
                tenant.pieces[device] = pieces
                placed |= {(key, device): piece for key, piece in zip(once, pieces, strict=True)}
            for site, param, delta in prepared.deltas:
                site.add_piece(param, slot, *placed[id(delta), site.device])
            for site, param, value in prepared.values:
                site.add_value(param, slot, value)
            # There for whoever names the slot from now on, on any stream.
            for device in dict.fromkeys(s.device for s, _, _ in prepared.values if s.device.type != "cpu"):
                torch.cuda.current_stream(device).synchronize()
        except BaseException:
            self._evict(tenant)
            raise
        if tenant.path is None:
            # The delta is in the arena now and is never evicted. A second copy would not be counted by memory().
            tenant.source = None
        for device, residency in self.residencies.items():
            copies = tenant.copies[device] = prepared.copies(device)
            residency.copies += copies
            tenant.bytes[device] = sum(padded(length) for _, length in tenant.pieces[device]) + copies

    def _free_slot(self, tenant: _Tenant) -> int:
        """The lowest slot that nobody has, whose entries are empty; MemoryError if the tables of graphs have none left."""
        slot = next(i for i in itertools.count() if i not in self._slots)
        if slot >= self.capacity and self.graphs:
            if not self._evict_one(tenant):
                raise MemoryError(
                    f"tenant {tenant.name!r} would be number {slot + 1} in memory, but graphs were made for {self.capacity} "
                    "(tenants.graph_rows(capacity=...)), and no other tenant is idle and in a file"
                )
            slot = next(i for i in itertools.count() if i not in self._slots)
        while slot >= self.capacity:
            self.capacity *= 2
        if self.unsettled:
            for arena in self.arenas.values():
                arena.settle()
            for site in self.sites.values():
                site.fixed.settle()
            self.unsettled = False
        return slot

    def _make_room(self, tenant: _Tenant, prepared: Prepared, old: _Tenant | None) -> None:
        need = {device: prepared.bytes(device) for device in self.devices}

        def evict() -> bool:
            if self._evict_one(tenant):
                return True
            # The one that is replaced goes last: in memory alone, it cannot come back, so only if that is enough everywhere.
            goes = old is not None and old.pins == 0 and old.slot is not None
            if goes and all(need[d] <= r.free + old.bytes[d] for d, r in self.residencies.items()):
                self._evict(old)
                return True
            return False

        for device, residency in self.residencies.items():
            if not residency.make_room(need[device], evict):
                where = f" on {device}" if self.is_spread else ""
                raise MemoryError(
                    f"tenant {tenant.name!r} takes {need[device]:,} bytes{where}, but of the budget's {residency.limit:,}"
                    f"{where and ' there'} only {residency.free:,} are free, and no other tenant is idle and in a file"
                )

    def _evict_one(self, tenant: _Tenant) -> bool:
        """Evict the least recently used tenant that is idle and in a file; False if there is none beside this one."""
        idle = [
            t
            for t in self._slots.values()
            if t.pins == 0 and t.path is not None and not t.gone and t is not tenant
        ]
        if idle:
            self._evict(min(idle, key=lambda t: t.last))
        return bool(idle)

    def _forget(self, tenant: _Tenant) -> None:
        tenant.gone = True
        if tenant.pins == 0:
            self._evict(tenant)

    def _evict(self, tenant: _Tenant) -> None:
        if tenant.slot is None:
            return
        for site in self.sites.values():
            site.drop(tenant.slot)
        self.unsettled = self.devices[0].type != "cpu"
        for device, residency in self.residencies.items():
            residency.release(tenant.pieces.pop(device, ()))
            residency.copies -= tenant.copies.pop(device, 0)
        del self._slots[tenant.slot]
        tenant.slot = None

    # Making tenants active.

    def use(
        self, names: "str | Sequence[str | None] | GraphRows | None", *, dim: int = 0
    ) -> AbstractContextManager[None]:
        """Compute with these tenants inside a `with`, in this thread or asyncio task, and in tasks started inside.

        Args:
            names: one name for all rows (None is the base), one for each row of the batch, or what `graph_rows` gives.
            dim: the dimension of the batch in what modules are given: 0, or 1 for models that are sequence first.

        Every module's input must then have the batch in that dimension; another shape raises, unless all rows are of one
        tenant. Threads do not inherit it: start them with `contextvars.copy_context().run`. Evicted tenants are read again
        from their files.

        Raises:
            KeyError: no tenant of that name; ValueError: no names, a tenant with tokens of its own beside others, or a file
                that has changed; RuntimeError, in a forward: the shapes do not fit, or the `with` has ended.
        """
        if dim not in (0, 1):
            raise ValueError(f"dim must be 0 or 1, but is {dim}")
        if isinstance(names, GraphRows):
            if dim != 0:
                raise ValueError("rows of a graph are dimension 0 of the batch, but dim is 1")
            return Use(self, names, dim)
        return Use(self, _named(names), dim)

    def graph_rows(self, batch: int, *, capacity: int | None = None) -> GraphRows:
        """Rows of a batch for CUDA graphs: who has which row is read from the device at each replay, and set between two.

        Capture a forward inside of `with tenants.use(rows)`; `rows.set(["alice", None, "bob"])` then says whose rows the next
        replays compute, in the buffers that the graph reads. All rows are the base's at first.

        Args:
            batch: how many rows there are; they are dimension 0.
            capacity: how many tenants can be in memory while any such rows are open: tables do not grow under a graph. None: as
                many as there is room for in the tables of rows that are open, else 32, or more if there are more.

        Raises:
            ValueError: the model is on the CPU or spread over several GPUs, a number is not positive, or rows that are open
                were made for fewer tenants.
        """
        for what, number in (("batch", batch), ("capacity", 1 if capacity is None else capacity)):
            if isinstance(number, bool) or not isinstance(number, int) or number <= 0:
                raise ValueError(f"{what} must be a positive number, but is {number!r}")
        if self.devices[0].type == "cpu":
            raise ValueError(
                "the model is on the CPU, which has no graphs to capture; give the names of each batch to tenants.use"
            )
        if self.is_spread:
            raise ValueError(
                f"the model is spread over {', '.join(map(str, self.devices))}, and a CUDA graph is captured on one device; "
                "give the names of each batch to tenants.use"
            )
        with self.lock:
            if self._detached:
                raise ValueError("these tenants are detached; attach the model again")
            capacity = (1 if self.graphs else _CAPACITY) if capacity is None else capacity
            if self.graphs and capacity > self.capacity:
                raise ValueError(
                    f"capacity is {capacity}, but graph_rows that are open were made for {self.capacity} tenants; close "
                    "them first"
                )
            self.capacity = max(self.capacity, capacity)
            made = GraphRows(self, batch)
            self.graphs.append(made)
        return made

    def hold(self, names: str | Sequence[str | None] | None) -> tuple[tuple[str | None, ...], list[int], Any]:
        """(names, the slot of each, what gives their tenants back); evicted ones are read again. Errors as `use`."""
        names = _named(names)
        self._watch.check()
        held: dict[str, _Tenant] = {}
        try:
            for name in dict.fromkeys(names):
                if name is not None:
                    held[name] = self._hold(name)
                    if held[name].alone:
                        raise ValueError(
                            f"tenant {name!r} has tensors of other shapes than the base's (added tokens) and is served alone, "
                            "not in rows of a graph"
                        )
            slots = [BASE if name is None else held[name].slot for name in names]
        except BaseException:
            self._release(tuple(held.values()))
            raise
        tenants = tuple(held.values())
        return names, slots, lambda: self._release(tenants)

    def stream(self, name: str | Sequence[str | None] | None, iterator: Any, *, dim: int = 0) -> Any:
        """Steps an iterator, generator or asynchronous one, each step inside of `use(name)`, and no longer.

        A `with tenants.use(...)` around a `yield` would be active for whoever steps the generator, too.

        Raises:
            TypeError: `iterator` is none; in a step, as `use`.
        """
        if hasattr(iterator, "__anext__"):
            return LaterStream(self, name, iterator, dim)
        if hasattr(iterator, "__next__"):
            return Stream(self, name, iterator, dim)
        raise TypeError(
            f"iterator must be an iterator or an asynchronous one, but is {type(iterator).__name__}"
        )

    def map(self, names: tuple[str | None, ...] | GraphRows, dim: int) -> RowMap:
        """The map of these names, whose tenants are held until it is closed; for `use`."""
        self._watch.check()
        if isinstance(names, GraphRows):
            return names.map(self)
        held: dict[str, _Tenant] = {}
        try:
            for name in dict.fromkeys(names):
                if name is not None:
                    held[name] = self._hold(name)
            alone = [name for name, tenant in held.items() if tenant.alone]
            if alone and len(set(names)) > 1:
                others = [n for n in dict.fromkeys(names) if n != alone[0]]
                raise ValueError(
                    f"tenant {alone[0]!r} has tensors of other shapes than the base's (added tokens) and is served alone; "
                    f"it was mixed with {others[0]!r}"
                )
            slots = [BASE if name is None else held[name].slot for name in names]
            tenants = tuple(held.values())
            out = RowMap(
                slots, names, dim=dim, release=lambda: self._release(tenants), device=self.devices[0]
            )
            out.ready(self.devices)
            out.together = self.proofs.together
            return out
        except BaseException:
            self._release(tuple(held.values()))
            raise

    def _hold(self, name: str) -> _Tenant:
        """The tenant, resident, and not to be evicted until it is released."""
        while True:
            with self.lock:
                tenant = self._find(name)
                if tenant.slot is not None:
                    tenant.pins += 1
                    tenant.last = next(self._clock)
                    return tenant
            with tenant.loading:
                if tenant.slot is None and not tenant.gone:
                    prepared = self._prepare(tenant)
                    with self.lock:
                        if not tenant.gone:
                            self._place(tenant, prepared)
                            tenant.pins += 1
                            return tenant

    def _release(self, tenants: tuple[_Tenant, ...]) -> None:
        # A collected graph, or generator with an open `use`, may call this in the midst of a change of the books.
        self.lock.later(tenants)

    def _let_go(self, tenants: tuple[_Tenant, ...]) -> None:
        for tenant in tenants:
            tenant.pins -= 1
            if tenant.gone and tenant.pins == 0:
                self._evict(tenant)

    def now(self, device: torch.device | None = None) -> RowMap | None:
        """The active map, for whoever reads a weight, which lies on `device`; RuntimeError where it cannot be what is meant."""
        rows = self.active.get()
        if _in_backward() != -1 and not (rows is not None and rows.carried):
            raise RuntimeError(
                "xorz: a weight is read or a module is run inside of a backward pass, where the tenants of its first run are "
                "not known; pass context_fn=tenants.carry to torch.utils.checkpoint (use_reentrant=False)"
            )
        if self.generators:
            error = stepping(rows, self.generators)
            if error is not None:
                raise error
        if _tracing() is not None:
            raise RuntimeError(
                "xorz: torch.jit.trace of an attached model would keep the tenant of the moment for good; trace after "
                "tenants.detach(), or use torch.compile"
            )
        if rows is not None and rows.root.closed and not rows.root.running:
            raise rows.root.ended()
        return rows if device is None or rows is None or not self.is_spread else rows.on(device)

    def rows(self, site: Site) -> RowMap | None:
        """The active map, or None for the base alone; RuntimeError where neither is meant. For attached modules."""
        rows = self.now(site.device)
        if rows is None and self.default != "base":
            whole = (
                ""
                if self.default is None
                else f" (only the model itself runs as {self.default!r} by default)"
            )
            raise RuntimeError(
                f"xorz: {site.name} is called and no tenant is active here{whole}; call the model inside of "
                '`with tenants.use(...)` in this thread or task, or attach with default="base"'
            )
        return rows

    def carry(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=tenants.carry)`.

        What is recomputed in the backward pass is computed with the tenants that are active now, which stay loaded until
        the graph is freed.
        """
        rows = self.active.get()
        if rows is None:
            if self.default != "base":
                raise RuntimeError("xorz: no tenant is active here, so there is nothing to carry")
            rows = self.of_base
        return nullcontext(), _Carried(self, rows)

    def regroup(self, index: Tensor, lead: Sequence[int]) -> AbstractContextManager[None]:
        """For modules that reorder tokens: inside of the `with`, inputs are [len(index), k], token i being the one that was
        at `index[i]` of the flattened rows of an input of leading shape `lead`.
        """
        rows = self.active.get()
        if rows is None:
            return nullcontext()
        if rows.fixed is not None:
            raise Unknown("regroup")
        slots = rows.rows(tuple(lead), False, "regroup")[index.reshape(-1).to(rows.device)]
        return self.active.set(rows.regroup(slots.tolist()))

    # Asking what is loaded.

    def memory(self) -> Memory:
        """Bytes: "base" (the model's own tensors), "deltas", "copies" (small dense tensors of tenants; on a device with the
        tables that forwards read), and their "total".
        """
        with self.lock:
            tables = sum(site.fixed.nbytes for site in self.sites.values() if site.fixed is not None)
            base = list(map(plain, (*self.model.parameters(), *self.model.buffers())))
            first, *others = self.residencies.values()
            found = first.memory(base, tables)
            for more in (residency.memory(()) for residency in others):
                found = {what: size + more[what] for what, size in found.items()}
            return Memory(found)

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every resident tenant."""
        with self.lock:
            return {t.name: sum(t.bytes.values()) for t in self._tenants.values() if t.slot is not None}

    def summary(self) -> str:
        """A table: how each attached module is served, and which tenants change it. A str, and a table in notebooks."""
        heads, rows = ("module", "class", "served as", "tenants"), []
        with self.lock:
            for name, site in self.sites.items():
                slots = {s for p in site.pieces.values() for s in p} | set(site.values)
                who = ", ".join(sorted(self._slots[s].name for s in slots if s in self._slots)) or "-"
                rows.append((name or "(model)", site.original.__name__, _SERVED_AS[site.kind], who))
            dense = [
                (name, f"made dense for {calls} calls, {size:,} bytes each")
                for name, (calls, size) in self._dense.items()
            ]
        lines = [f"{name:40} {kind:24} {served:10} {who}" for name, kind, served, who in (heads, *rows)]
        lines += [f"{name:40} {text}" for name, text in dense]
        return Summary("\n".join(lines), heads, [*rows, *((name, "", "", text) for name, text in dense)])

    def _repr_html_(self) -> str:
        """Each tenant with its bytes, for notebooks."""
        with self.lock:
            rows = [
                (t.name, "in memory" if t.slot is not None else "in its file", f"{sum(t.bytes.values()):,}")
                for t in self._tenants.values()
            ]
        return table(("tenant", "is", "bytes"), rows) + self.memory()._repr_html_()

    def __repr__(self) -> str:
        """How many tenants are loaded and resident, and the bytes of base, deltas and copies."""
        try:
            memory = self.memory()
        except (AttributeError, RuntimeError):
            # The model is no longer what was attached: whoever debugs that is not to be stopped here.
            return f"Tenants({len(self._tenants)} loaded, {len(self._slots)} in memory, {len(self.sites)} modules)"
        return (
            f"Tenants({len(self._tenants)} loaded, {len(self._slots)} in memory, {len(self.sites)} modules; "
            f"base {memory['base']:,} bytes, deltas {memory['deltas']:,}, copies {memory['copies']:,})"
        )

    def detach(self) -> nn.Module:
        """Unload everything and give the plain model back, the same object; ValueError while a `use` is open."""
        with self.lock:
            busy = [t.name for t in self._slots.values() if t.pins]
            if busy:
                raise ValueError(
                    f"tenant {busy[0]!r} is in use; leave its `with tenants.use(...)` first"
                    + (", and close the rows of graphs" if self.graphs else "")
                )
            if self.graphs:
                raise ValueError("rows of a graph are open; close() them first")
            for name in list(self._tenants):
                self.unload(name)
            swap.unshroud(self._shrouded)
            self._shrouded = []
            for module in (*self.methods, *self.modules.values()):
                swap.restore_class(module)
            self._detached = True
            if self.model.__dict__.get("xorz") is self:
                del self.model.__dict__["xorz"]
            return self.model

    def _find(self, name: str) -> _Tenant:
        try:
            return self._tenants[name]
        except KeyError:
            loaded = ", ".join(map(repr, list(self._tenants)[:5])) or "none"
            raise KeyError(f"no tenant is called {name!r}; loaded: {loaded}") from None

    def _check(self, name: str) -> None:
        if self._detached:
            raise ValueError("these tenants are detached; attach the model again")
        if not isinstance(name, str) or not name:
            raise TypeError(f"a tenant's name must be a str that is not empty, but is {name!r}")


class _Carried:
    """Makes a map active during recomputation, and keeps its tenants until it is collected with the graph."""

    def __init__(self, owner: Tenants, rows: RowMap) -> None:
        self._owner = owner
        with owner.lock:
            self._held = tuple(owner._slots[slot] for slot in rows.used if slot != BASE)
            for tenant in self._held:
                tenant.pins += 1
        self._rows = RowMap(rows.slots, rows.names, dim=rows.dim, tokens=rows.tokens, device=rows.device)
        self._rows.carried = True
        self._open: list[Any] = []

    def __enter__(self) -> None:
        context = self._owner.active.set(self._rows)
        context.__enter__()
        self._open.append(context)

    def __exit__(self, *exc: Any) -> None:
        self._open.pop().__exit__(*exc)

    def __del__(self) -> None:
        self._owner._release(self._held)


_SERVED_AS = {
    "linear": "delta",
    "conv1d": "delta",
    "embedding": "delta",
    "attention": "delta",
    "experts": "delta",
    "rows": "rows",
    "split": "split",
}


_CAPACITY = 32
"""Tenants in memory for whom graphs are made, if nobody says how many."""

_in_backward = torch._C._current_graph_task_id
_tracing = torch._C._get_tracing_state


def _named(names: Any) -> tuple[str | None, ...]:
    """One name for each row, or one for all; TypeError or ValueError if these are none."""
    if names is None or isinstance(names, str):
        names = (names,)
    try:
        names = tuple(names)
    except TypeError:
        raise TypeError(
            f"names must be a tenant's name, None, or a list of those, one for each row, but is {names!r}"
        ) from None
    if not names:
        raise ValueError("names is empty; give one name for each row of the batch")
    for name in names:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"a tenant's name must be a str or None, but is {type(name).__name__}")
    return names


def _identity(path: Path) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
