"""Iterators that are stepped inside of a `use`: a `with` around a `yield` would be active for whoever steps the generator."""

from typing import Any


class Stream:
    """An iterator whose tenant is active during each of its steps; made by `Tenants.stream`."""

    def __init__(self, owner: Any, name: Any, iterator: Any, dim: int) -> None:
        """`owner` is the `Tenants`; the others are the arguments of its `stream`."""
        self._owner, self._name, self._iterator, self._dim = owner, name, iterator, dim

    def __iter__(self) -> "Stream":
        """The same object, as iterators are."""
        return self

    def __next__(self) -> Any:
        """The next one, made inside of `use`."""
        with self._owner.use(self._name, dim=self._dim):
            return next(self._iterator)

    def close(self) -> None:
        """End the iterator, if it is one that can be ended."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()


class LaterStream:
    """An asynchronous iterator whose tenant is active during each of its steps; made by `Tenants.stream`."""

    def __init__(self, owner: Any, name: Any, iterator: Any, dim: int) -> None:
        """`owner` is the `Tenants`; the others are the arguments of its `stream`."""
        self._owner, self._name, self._iterator, self._dim = owner, name, iterator, dim

    def __aiter__(self) -> "LaterStream":
        """The same object, as iterators are."""
        return self

    async def __anext__(self) -> Any:
        """The next one, awaited inside of `use`."""
        with self._owner.use(self._name, dim=self._dim):
            return await self._iterator.__anext__()

    async def aclose(self) -> None:
        """End the iterator, if it is one that can be ended."""
        close = getattr(self._iterator, "aclose", None)
        if close is not None:
            await close()
