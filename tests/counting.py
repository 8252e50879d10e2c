"""How much work something is, as a number that is the same on every machine."""

import sys
from collections.abc import Callable


def bytecodes(work: Callable[[], object]) -> int:
    """How many bytecodes Python takes for it. What happens inside of one, such as a sort, is not seen."""
    taken = 0

    def count(frame, event, _):
        nonlocal taken
        frame.f_trace_opcodes = True
        taken += event == "opcode"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        work()
    finally:
        sys.settrace(before)
    return taken
