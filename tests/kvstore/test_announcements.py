"""What is still to be told: each name once in a while, the oldest dropped, nothing without a bound."""

import random

from directory_world import keys_of

from kvferry.common.clock import ManualClock
from kvferry.kvstore.announcements import LATELY_S, Announcements

KEYS = keys_of("x", 300)


def test_a_name_is_queued_once_in_a_while():
    clock = ManualClock()
    queue = Announcements(clock)
    queue.add(KEYS[:100])
    queue.add(KEYS[:100])
    assert queue.take(1000) == KEYS[:100]
    queue.add(KEYS[:120])
    assert queue.take(1000) == KEYS[100:120], "what was taken is remembered"
    clock.advance(LATELY_S - 1)
    queue.add(KEYS[:121])
    assert queue.take(1000) == KEYS[120:121]
    clock.advance(1)
    queue.add(KEYS[:122])
    assert queue.take(1000) == KEYS[121:122], "the names of before are still known for a while"
    clock.advance(LATELY_S)
    queue.add(KEYS[:122])
    assert queue.take(1000) == KEYS[:121]
    clock.advance(3 * LATELY_S)
    queue.add(KEYS[:122])
    assert queue.take(1000) == KEYS[:122]
    queue.check_integrity()


def test_the_oldest_are_dropped_and_may_come_again():
    queue = Announcements(ManualClock(), max_waiting=100)
    queue.add(KEYS[:130])
    assert (len(queue), queue.dropped) == (100, 30)
    queue.add(KEYS[:10])
    assert (len(queue), queue.dropped) == (100, 40)
    taken = queue.take(20)
    assert taken == KEYS[40:60]
    queue.add(KEYS[200:215])
    queue.put_back(taken)
    assert (len(queue), queue.dropped) == (100, 55)
    assert queue.take(1000) == [*KEYS[55:130], *KEYS[:10], *KEYS[200:215]], "back in its place"
    queue.check_integrity()


def test_what_is_forgotten_is_told_again():
    queue = Announcements(ManualClock())
    queue.add(KEYS)
    queue.take(1000)
    queue.forget()
    queue.add(KEYS)
    assert queue.take(1000) == KEYS


def test_whatever_happens_the_bounds_hold():
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    pick = random.Random(seed)
    clock = ManualClock()
    queue = Announcements(clock, max_waiting=50, max_lately=40)
    told = dropped = 0
    for _ in range(2000):
        match pick.randrange(5):
            case 0 | 1:
                queue.add(pick.sample(KEYS, pick.randrange(60)))
            case 2:
                taken = queue.take(pick.randrange(60))
                if pick.random() < 0.5:
                    queue.put_back(taken)
                else:
                    told += len(taken)
            case 3:
                clock.advance(pick.random() * LATELY_S)
            case 4:
                if pick.random() < 0.1:
                    queue.forget()
        queue.check_integrity()
        assert queue.dropped >= dropped
        dropped = queue.dropped
    assert told > 1000
    assert dropped > 0
