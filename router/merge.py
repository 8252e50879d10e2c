"""Several streams of things as one."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def side_by_side(streams: Sequence[AsyncGenerator[T, None]], at_once: int | None = None) -> AsyncIterator[T]:
    """The items of all streams as they come, each stream's in order.

    At most `at_once` streams are open at a time, all unless it is set; those after them begin as others end. A stream
    waits until its item is taken. The first error ends everything, and so does closing this: every stream is closed
    then, and none is left behind.
    """
    places = asyncio.Semaphore(at_once or len(streams))
    arrived: asyncio.Queue[tuple[T | None, Exception | None]] = asyncio.Queue(1)

    async def read(stream: AsyncGenerator[T, None]) -> None:
        error = None
        try:
            async with places, aclosing(stream):
                async for item in stream:
                    await arrived.put((item, None))
        except Exception as failed:
            error = failed
        await arrived.put((None, error))

    reading = [asyncio.create_task(read(stream)) for stream in streams]
    try:
        going_on = len(streams)
        while going_on:
            item, error = await arrived.get()
            if error is not None:
                raise error
            if item is None:
                going_on -= 1
            else:
                yield item
    finally:
        for task in reading:
            task.cancel()
        if reading:
            await asyncio.wait(reading)
