"""The thread that runs steps, one at a time, beside the event loop.

An executor would do the same, with more to do for each call.
"""

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class StepThread:
    """Started with the object; ends some time after `stop`, once the call that is running is done."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._work, name="step", daemon=True).start()

    async def run(self, function: Callable[[Argument], Result], argument: Argument) -> Result:
        """`function(argument)`, computed on the thread. Raises what it raises. Not after `stop`."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()

        def tell(settle: Callable[[object], None], outcome: object) -> None:
            if not done.done():  # nobody waits where the caller was cancelled
                settle(outcome)

        def call() -> None:
            try:
                settle, outcome = done.set_result, function(argument)
            except StopIteration as error:  # the one exception that a future does not take
                settle, outcome = done.set_exception, RuntimeError(f"a call ended in {error!r}")
            except BaseException as error:
                settle, outcome = done.set_exception, error
            if not loop.is_closed():
                loop.call_soon_threadsafe(tell, settle, outcome)

        self._calls.put(call)
        return await done

    def stop(self) -> None:
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
