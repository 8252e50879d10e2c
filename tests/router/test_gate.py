"""What the requests under way may hold of the router, and that what they give back is there again."""

import pytest

from kvferry.common.errors import Overloaded
from kvferry.router.gate import Gate


def test_how_many_requests_there_may_be():
    gate = Gate(2, 100)
    with gate.enter():
        with gate.enter(), pytest.raises(Overloaded, match="this server serves 2 requests already; try again later"):
            gate.enter()
        with gate.enter():
            assert gate.requests == 2
    assert gate.requests == 0


def test_how_large_all_bodies_may_be():
    gate = Gate(9, 100)
    with gate.enter() as one:
        one.hold(60)
        with gate.enter() as other:
            other.hold(39)
            other.hold(1)
            for place, others in ((one, 40), (other, 60)):
                with pytest.raises(Overloaded, match=f"take {others} of the 100 bytes"):
                    place.hold(1)
        assert gate.body_bytes == 60, "what was refused is not held"
        one.hold(100)  # there is nobody to wait for
    assert gate.body_bytes == 0
