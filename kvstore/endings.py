"""Waiting for tasks and futures to end, by who no longer wants what they do."""

import asyncio
import logging

log = logging.getLogger(__name__)


async def end(task: asyncio.Task) -> None:
    """Cancel a task of ours and wait for it; an error of its own is a bug, and is logged."""
    task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    if isinstance(outcome, Exception):
        log.error("a background task failed", exc_info=outcome)


async def settled(future: asyncio.Future) -> None:
    """Wait until `future` is done, through any number of cancellations. The caller is being cancelled already."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("a cancelled copy failed: %r", error)
