"""Several streams of things as one."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def side_by_side(streams: Sequence[AsyncGenerator[T, None]], at_once: int | None = None) -> AsyncIterator[T]:
    """The items of all streams as they come, each stream's in order.

    At most `at_once` streams are open at a time, all unless it is set; those after them begin as others end. Each waits
    until its item is taken, in the order of arrival, so none starves another. The first error ends everything, and so
    does closing this: every stream is closed then, and none is left behind.
    """
    places = asyncio.Semaphore(at_once or len(streams))
    # An item and whom to tell that it is taken; at a stream's end no item, and the error that it ended in, if any.
    arrived: asyncio.Queue[tuple[T | None, asyncio.Event | Exception | None]] = asyncio.Queue()

    async def read(stream: AsyncGenerator[T, None]) -> None:
        taken = asyncio.Event()
        try:
            async with places, aclosing(stream):
                async for item in stream:
                    taken.clear()
                    arrived.put_nowait((item, taken))
                    await taken.wait()
        except Exception as error:
            arrived.put_nowait((None, error))
        else:
            arrived.put_nowait((None, None))

    reading = [asyncio.create_task(read(stream)) for stream in streams]
    try:
        going_on = len(streams)
        while going_on:
            item, what = await arrived.get()
            if isinstance(what, Exception):
                raise what
            if what is None:
                going_on -= 1
            else:
                what.set()
                yield item
    finally:
        for task in reading:
            task.cancel()
        if reading:
            await asyncio.wait(reading)
