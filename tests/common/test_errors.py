"""The one table of errors: complete, and reversible over gRPC."""

import grpc
import pytest

from kvferry.common import errors
from kvferry.common.errors import OUTCOMES, Internal, KvferryError, Unavailable, error_from_grpc, outcome_of


def kinds() -> list[type[KvferryError]]:
    found, more = [], [KvferryError]
    while more:
        kind = more.pop()
        more += kind.__subclasses__()
        found.append(kind)
    return [kind for kind in found if kind.__module__ == errors.__name__ and kind is not KvferryError]


def test_every_error_has_a_row_and_every_row_an_error():
    assert set(kinds()) == set(OUTCOMES)


def test_a_grpc_status_means_one_error():
    statuses = [outcome.grpc for outcome in OUTCOMES.values() if outcome.grpc is not None]
    assert len(set(statuses)) == len(statuses)
    known = {status.name for status in grpc.StatusCode}
    assert set(statuses) <= known - {"OK", "CANCELLED", "UNKNOWN"}, "these are what a broken connection gives"


@pytest.mark.parametrize("kind", [kind for kind in OUTCOMES if OUTCOMES[kind].grpc], ids=lambda kind: kind.__name__)
def test_an_error_comes_back_as_it_went(kind):
    sent = kind("why it failed")
    back = error_from_grpc(outcome_of(sent).grpc, str(sent))
    assert type(back) is kind
    assert str(back) == "why it failed"


def test_a_refusal_names_its_field_on_the_other_side_too():
    refused = error_from_grpc("INVALID_ARGUMENT", "n is wrong", "n")
    assert (type(refused), refused.param) == (errors.InvalidRequest, "n")
    assert error_from_grpc("INVALID_ARGUMENT", "it is wrong").param is None


@pytest.mark.parametrize("status", ["CANCELLED", "UNKNOWN", "UNAVAILABLE"])
def test_a_broken_connection_is_unavailable(status):
    assert type(error_from_grpc(status, "gone")) is Unavailable


@pytest.mark.parametrize("bug", [ValueError("x"), KeyError("x"), KvferryError("x"), BaseException()])
def test_what_is_not_ours_is_internal(bug):
    assert outcome_of(bug) is OUTCOMES[Internal]


@pytest.mark.parametrize("kind", OUTCOMES, ids=lambda kind: kind.__name__)
def test_http_tells_who_has_to_act(kind):
    """A client's mistakes are 4xx and not worth a repetition as they stand; what may pass by itself says when."""
    outcome = OUTCOMES[kind]
    assert 400 <= outcome.http < 600
    assert (outcome.http >= 500) == (outcome.kind == "server_error")
    assert (outcome.retry_after_s is not None) == (outcome.http in (429, 503))
