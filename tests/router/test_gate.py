"""What the requests under way may hold of the router, and that what they give back is there again."""

from contextlib import ExitStack

import pytest

from kvferry.common.errors import Overloaded
from kvferry.router.gate import Gate


@pytest.fixture
def shared() -> Gate:
    gate = Gate(16, 160)
    gate.shared = True
    return gate


def test_how_many_requests_there_may_be():
    gate = Gate(2, 100)
    with gate.enter("a"):
        with gate.enter("a"), pytest.raises(Overloaded, match="this server serves 2 requests already; try again later"):
            gate.enter("b")
        with gate.enter("b"):
            assert gate.requests == 2
    assert gate.requests == 0
    gate.check_integrity()


def test_how_large_all_bodies_may_be():
    gate = Gate(9, 100)
    with gate.enter("a") as one:
        one.hold(60)
        with gate.enter("a") as other:
            other.hold(39)
            other.hold(1)
            for place, others in ((one, 40), (other, 60)):
                with pytest.raises(Overloaded, match=f"take {others} of the 100 bytes"):
                    place.hold(1)
        assert gate.body_bytes == 60, "what was refused is not held"
        one.hold(100)  # there is nobody to wait for
    assert gate.body_bytes == 0
    gate.check_integrity()


def test_a_body_that_is_gone_is_not_held():
    gate = Gate(9, 100)
    with gate.enter("a") as one, gate.enter("b") as other:
        one.hold(90)
        with pytest.raises(Overloaded):
            other.hold(11)
        one.keep(20)
        other.hold(80)
        other.keep(85)  # what it is made into may be more than it was
        assert gate.body_bytes == 105
        gate.check_integrity()
    assert gate.body_bytes == 0


def entered(gate: Gate, stack: ExitStack, tenant: str) -> int:
    """How many requests more of a tenant's there may be."""
    for count in range(100):
        try:
            stack.enter_context(gate.enter(tenant))
        except Overloaded:
            gate.check_integrity()
            return count
    raise AssertionError("there is no bound")


def test_places_are_left_for_others(shared):
    """Whoever comes gets half of what is left, and at least one place while there is one."""
    with ExitStack() as stack:
        assert [entered(shared, stack, tenant) for tenant in "abcdef"] == [8, 4, 2, 1, 1, 0]
        with pytest.raises(Overloaded, match="this server serves 16 requests already"):
            shared.enter("a")
    with ExitStack() as stack:
        entered(shared, stack, "a")
        with pytest.raises(Overloaded, match="this tenant has 8 requests under way, its share"):
            shared.enter("a")
    assert shared.requests == 0
    shared.check_integrity()


def test_bytes_are_left_for_others(shared):
    with shared.enter("a") as first, shared.enter("a") as second, shared.enter("b") as other:
        first.hold(60)
        second.hold(20)
        for place in (first, second):
            with pytest.raises(Overloaded, match=r"the bodies of this tenant's other requests take \d0 bytes"):
                place.hold(1)
        other.hold(80)
        other.keep(40)
        with pytest.raises(Overloaded):
            second.hold(1)
        first.keep(0)
        second.hold(30)
    assert shared.body_bytes == 0


def test_a_body_by_itself_needs_room_only(shared):
    """However large its part of what is there."""
    with shared.enter("a") as one, shared.enter("b") as other:
        other.hold(10)
        one.hold(150)
        with pytest.raises(Overloaded, match="take 10 of the 160 bytes"):
            one.hold(1)
