"""Requests made into jobs: one a prompt, with all that was left open settled."""

import asyncio
import json
import secrets

import pytest

from kvferry.cli.demo_model import byte_tokenizer
from kvferry.common.block import BlockLayout
from kvferry.common.errors import InvalidRequest
from kvferry.common.hashing import TenantKeys
from kvferry.router.flow import Job
from kvferry.router.jobs import jobs_of
from kvferry.router.limits import Limits
from kvferry.router.nodes import ServedModel
from kvferry.router.openai import parse_request
from kvferry.router.text import Tokenizer

BYTES = Tokenizer(byte_tokenizer())
MODEL = ServedModel("m", "m", b"f" * 32, BlockLayout(1, 1, 16, 8, "float32"), 264, 64)
POOL = 48


def jobs(kind: str = "completion", told: int = 2**18, limits: Limits | None = None, **fields) -> list[Job]:
    said = {"messages": [{"role": "user", "content": "p"}]} if kind == "chat" else {"prompt": "p"}
    asked = parse_request(kind, json.dumps({"model": "m", **said, **fields}).encode())
    keys = TenantKeys.of(b"k" * 32)
    return asyncio.run(jobs_of(asked, limits or Limits(told=told), keys, "r", BYTES, MODEL, POOL))


def refused(**fields) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as error:
        jobs(**fields)
    return error.value


def test_one_job_a_prompt():
    several = jobs(prompt=["a", "bc"], n=3, priority=-4, seed=9)
    assert [list(job.token_ids) for job in several] == [[256, 97], [256, 98, 99]]
    assert [job.request_id for job in several] == ["r-0", "r-1"]
    assert [(job.params.n, job.params.seed, job.priority) for job in several] == [(3, 9, -4)] * 2
    (one,) = jobs(prompt=[[97]])
    assert (one.request_id, list(one.token_ids), one.params.n, one.priority) == ("r", [97], 1, 0)


def test_a_seed_for_each_prompt_where_none_is_asked_for():
    first, second = jobs(prompt=["a", "a"])
    assert first.params.seed != second.params.seed


def test_how_many_tokens_to_generate():
    assert jobs()[0].params.max_tokens == 16
    assert jobs("chat")[0].params.max_tokens == POOL - len(jobs("chat")[0].token_ids)
    assert jobs(prompt=[97] * 63, max_tokens=1)[0].params.max_tokens == 1
    assert jobs(prompt="a", echo=True, max_tokens=0)[0].params.max_tokens == 1
    assert refused(prompt=[97] * 63, max_tokens=2).param == "max_tokens"
    assert refused(prompt=[97] * 64, max_tokens=1).param == "prompt"
    assert refused(prompt=["a", "a" * 60], max_tokens=10).param == "max_tokens"
    assert refused(prompt=[[97], [264]]).param == "prompt"


@pytest.mark.parametrize(
    ("fields", "logprobs", "prompt_logprobs"),
    [
        ({}, None, None),
        ({"echo": True}, None, None),
        ({"logprobs": 3}, 3, None),
        ({"prompt_logprobs": 2}, None, 2),
        ({"echo": True, "logprobs": 0}, 0, 0),
        ({"echo": True, "logprobs": 3, "prompt_logprobs": 2}, 3, 3),
        ({"echo": True, "logprobs": 1, "prompt_logprobs": 2}, 1, 2),
        ({"logprobs": 5, "prompt_logprobs": 0}, 5, 0),
    ],
)
def test_what_is_told_of_which_tokens(fields, logprobs, prompt_logprobs):
    (job,) = jobs(**fields)
    assert (job.params.logprobs, job.params.prompt_logprobs) == (logprobs, prompt_logprobs)


def test_how_much_is_told_of_prompts():
    """Log probabilities: of each token its own and the likeliest, over all prompts and answers."""
    prompts = {"prompt": [[97] * 10, [97] * 5], "n": 2}
    assert len(jobs(prompt_logprobs=3, told=120, **prompts)) == 2
    error = refused(prompt_logprobs=3, told=119, **prompts)
    assert error.param == "prompt_logprobs"
    assert "4 log probabilities of each of 15 prompt tokens, in 2 answers" in str(error)
    assert refused(echo=True, logprobs=3, told=119, **prompts).param == "logprobs"
    assert len(jobs(logprobs=3, told=256, **prompts)) == 2, "nothing is told of the prompts"


def test_how_much_is_told_of_an_answer():
    """Of each token that may be generated, in all answers; a stream tells it bit by bit."""
    asked = {"prompt": [[97] * 10, [97] * 5], "n": 2, "logprobs": 3, "max_tokens": 7}
    for told in (112, 113):
        assert len(jobs(told=told, **asked)) == 2
    error = refused(told=111, **asked)
    assert error.param == "logprobs"
    assert "4 log probabilities of each of up to 14 generated tokens, in 2 answers" in str(error)
    assert len(jobs(told=111, stream=True, **asked)) == 2
    assert len(jobs(told=0, **asked | {"logprobs": None})) == 2
    chat = {"kind": "chat", "logprobs": True, "top_logprobs": 3, "max_tokens": 7}
    assert len(jobs(told=28, **chat)) == 1
    assert refused(told=27, **chat).param == "top_logprobs"


def test_an_answer_without_a_limit_of_its_own_ends_where_no_more_can_be_told():
    """It is not refused: who leaves max_tokens out takes what there is room for."""
    asked = {"kind": "chat", "n": 2, "logprobs": True, "top_logprobs": 3}
    (free,) = [job.params.max_tokens for job in jobs(kind="chat", n=2)]
    assert free > 7
    assert [job.params.max_tokens for job in jobs(told=56, **asked)] == [7]
    assert [job.params.max_tokens for job in jobs(told=56, stream=True, **asked)] == [free]


def test_how_much_of_prompts_is_said_again():
    """In each of their answers: as their text, or as their token ids. Once is always allowed."""
    small = {"prompt_chars": 100, "prompt_tokens": 120}
    for field, prompt, noun, most in (
        ("echo", "a" * 25, "25 prompt characters", 100),
        ("echo", [[97] * 10, [97] * 20], "30 prompt tokens", 120),
        ("return_token_ids", "a" * 29, "30 prompt tokens", 120),
    ):
        assert jobs(prompt=prompt, n=4, **{field: True}, limits=Limits(**small))
        assert jobs(prompt=prompt, n=5, limits=Limits(**small))
        error = refused(prompt=prompt, n=5, **{field: True}, limits=Limits(**small))
        assert error.param == field
        assert str(error).startswith(f"{field} repeats {noun} in 5 answers; this server repeats up to {most} in all")
    assert jobs(prompt="a" * 60, echo=True, return_token_ids=True, max_tokens=1, limits=Limits(**small))


def test_seeds_are_drawn_once_for_all_prompts(monkeypatch):
    drawn = []
    draw = secrets.token_bytes
    monkeypatch.setattr(secrets, "token_bytes", lambda size: drawn.append(size) or draw(size))
    seeds = {job.params.seed for job in jobs(prompt=["a"] * 100)}
    assert drawn == [800]
    assert len(seeds) == 100
    assert max(seeds) >= 2**63
    assert {job.params.seed for job in jobs(prompt=["a"] * 3, seed=-1)} == {2**64 - 1}
