"""What a type checker knows of calls. It must refuse each line that is marked as an error, and no other."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import assert_type

from actors import Actor, Handle, Handles, Stream, Streams, from_thread


class Base(Actor):
    async def shared(self) -> bytes:
        return b""


class Trainer(Base):
    async def fit(self, steps: int, *, rate: float = 0.1) -> float:
        return steps * rate

    def load(self, path: str) -> list[int]:
        assert_type(from_thread.run(self.fit, 3, rate=0.2), float)
        from_thread.run(self.fit, "3")  # error
        from_thread.run(self.load, "3")  # error
        return []

    async def rows(self, count: int) -> AsyncIterator[str]:
        yield str(count)

    async def pairs(self) -> AsyncGenerator[tuple[int, int], None]:
        yield 1, 2


class Reader(Actor):
    async def read(self) -> None: ...


async def one(handle: Handle[Trainer]) -> None:
    assert_type(await handle.call(Trainer.fit, 100), float)
    assert_type(await handle.call(Trainer.fit, steps=100, rate=0.5), float)
    assert_type(await handle.call(Trainer.load, "here"), list[int])
    assert_type(await handle.call(Trainer.shared), bytes)
    assert_type(await handle.call(Base.shared), bytes)
    assert_type(handle.call(Trainer.rows, 3), Stream[str])
    async with handle.call(Trainer.rows, 3) as rows:
        assert_type([row async for row in rows], list[str])
    async with handle.call(Trainer.pairs) as pairs:
        assert_type([pair async for pair in pairs], list[tuple[int, int]])

    await handle.call(Trainer.fit)  # error
    await handle.call(Trainer.fit, "100")  # error
    await handle.call(Trainer.fit, 100, 0.5)  # error
    await handle.call(Trainer.fit, 100, rat=0.5)  # error
    await handle.call(Trainer.load, 5)  # error
    await handle.call(Reader.read)  # error
    handle.call(Trainer.rows, "3")  # error
    await handle.call(Trainer.rows, 3)  # error


async def all_of(handles: Handles[Trainer]) -> None:
    assert_type(await handles.call(Trainer.fit, 100), list[float])
    assert_type(await handles.call(Trainer.load, "here"), list[list[int]])
    assert_type(handles.call(Trainer.rows, 3), Streams[str])
    assert_type(handles[0], Handle[Trainer])
    assert_type(handles[1:], Handles[Trainer])
    assert_type([handle.rank for handle in handles], list[int])
    async with handles.call(Trainer.rows, 3) as streams:
        assert_type([row async for row in streams[0]], list[str])

    await handles.call(Trainer.fit, "100")  # error
    await handles.call(Reader.read)  # error
