"""Requests made from `/openapi.json` itself, right ones and wrong ones: no answer is one that the document does not
have, and none is a failure of ours."""

import httpx
import pytest
import schemathesis
from e2e.cluster import Cluster
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
SHORT, LONG = 25, 150
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
OPERATIONS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{id}"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/ping"),
    ("POST", "/ping"),
    ("GET", "/version"),
]
BARE = [one for one in OPERATIONS if one[0] == "GET" or one[1] == "/ping"]  # nothing in these can be wrong
POSTED = [(*operation, mode) for operation in OPERATIONS if operation not in BARE for mode in (RIGHT, WRONG)]
ASKED = [(*operation, RIGHT) for operation in BARE]


@pytest.fixture(scope="module")
def document(shared) -> dict:
    return httpx.get(f"{shared('llama').url}/openapi.json").json()


def exercise(cluster: Cluster, document: dict, method: str, path: str, examples: int, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=cluster.url)
    schema.config.checks.negative_data_rejection.expected_statuses = ["400"]
    operation = schema[path][method]
    headers = {"Authorization": f"Bearer {cluster.key}"}

    @seed(7)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and path.startswith("/v1") and mode is RIGHT:
            case.body |= {"max_tokens": 2, "timeout": 30}  # else it may fill the context, or have no time
        if isinstance(case.body, dict) and isinstance(model := case.body.get("model"), str) and model:
            case.body["model"] = "llama"  # else the answer to anything is that there is no such model
        response = case.call(headers=headers, timeout=30)
        assert response.status_code < 500 or response.status_code == 503, response.text
        case.validate_response(response, checks=CHECKS)

    ask()


@pytest.mark.parametrize(("method", "path", "mode"), POSTED + ASKED)
def test_no_answer_is_a_surprise(method, path, mode, llama, document):
    exercise(llama, document, method, path, SHORT, mode)


@pytest.mark.long
@pytest.mark.parametrize(("method", "path", "mode"), POSTED)
def test_no_answer_is_a_surprise_at_length(method, path, mode, llama, document):
    exercise(llama, document, method, path, LONG, mode)


def test_every_operation_is_tried(document):
    assert sorted(OPERATIONS) == sorted(
        (method.upper(), path) for path, operations in document["paths"].items() for method in operations
    )
