"""Every refusal has a type, and one table says what that type is over HTTP and over gRPC.

An error's message is one sentence for the person who can act on it; nothing in it is secret (no prompt, no key).
"""

from dataclasses import dataclass


class KvferryError(Exception):
    """Base of all errors that are answers. Anything else that escapes is a bug, and is answered as `Internal`."""


class InvalidRequest(KvferryError):
    """The request can never succeed as it stands. `param` names the field at fault, where there is one."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class Unauthenticated(KvferryError):
    """No key, or not a valid one."""


class NotFound(KvferryError):
    """The route does not exist here."""


class ModelNotFound(KvferryError):
    """No worker has ever announced a model of that name here."""

    param = "model"


class MethodNotAllowed(KvferryError):
    """The route exists, the method does not. `allow`: those that do, as the header of that name has them."""

    def __init__(self, message: str, allow: str = ""):
        super().__init__(message)
        self.allow = allow


class TooLarge(KvferryError):
    """The request's body is over the limit."""


class HeadersTooLarge(KvferryError):
    """The request's head is over the limit."""


class ExpectationFailed(KvferryError):
    """The request's Expect header wants what this server does not do."""


class UnsupportedEncoding(KvferryError):
    """The request's body is encoded; bodies are taken as they are."""


class ArrivedTooSlowly(KvferryError):
    """The request's body was not all there in time."""


class RateLimited(KvferryError):
    """This tenant has used what its limits allow; it may try again after `retry_after_s`, if that is known."""

    def __init__(self, message: str, retry_after_s: int | None = None):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(KvferryError):
    """Every queue that could take the request is full; it may try again later."""


class Unavailable(KvferryError):
    """A part that the request needs is not there (starting, draining, dead); it may try again later."""


class DeadlineExceeded(KvferryError):
    """The answer was not ready in time."""


class IncompatibleNode(KvferryError):
    """Two processes disagree about model, dtype, block size or layout. The message gives the difference."""


class NotAllowed(KvferryError):
    """The caller's certificate is of a role that may not call this."""


class ConfigError(KvferryError):
    """A flag, file or environment value is wrong. Ends the process before it starts to serve."""


class NotANumber(KvferryError):
    """The model gave logits that are not numbers. Trying again gives the same."""


class Internal(KvferryError):
    """We failed. The request may be tried again; the log has the cause."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one type of error is told to the outside."""

    http: int
    grpc: str | None  # the name of a grpc.StatusCode, each once, so that it maps back; None of what only HTTP has
    kind: str  # `error.type` in an OpenAI error body
    code: str  # `error.code` there
    retry_after_s: int | None = None


OUTCOMES: dict[type[KvferryError], Outcome] = {
    InvalidRequest: Outcome(400, "INVALID_ARGUMENT", "invalid_request_error", "invalid_request"),
    Unauthenticated: Outcome(401, "UNAUTHENTICATED", "authentication_error", "invalid_api_key"),
    NotFound: Outcome(404, "NOT_FOUND", "invalid_request_error", "not_found"),
    ModelNotFound: Outcome(404, None, "invalid_request_error", "model_not_found"),
    MethodNotAllowed: Outcome(405, "UNIMPLEMENTED", "invalid_request_error", "method_not_allowed"),
    TooLarge: Outcome(413, "OUT_OF_RANGE", "invalid_request_error", "request_too_large"),
    HeadersTooLarge: Outcome(431, None, "invalid_request_error", "headers_too_large"),
    ExpectationFailed: Outcome(417, None, "invalid_request_error", "expectation_failed"),
    UnsupportedEncoding: Outcome(415, None, "invalid_request_error", "unsupported_encoding"),
    ArrivedTooSlowly: Outcome(408, None, "invalid_request_error", "request_timeout"),
    RateLimited: Outcome(429, "ABORTED", "rate_limit_exceeded", "rate_limit_exceeded", retry_after_s=1),
    Overloaded: Outcome(503, "RESOURCE_EXHAUSTED", "server_error", "overloaded", retry_after_s=1),
    Unavailable: Outcome(503, "UNAVAILABLE", "server_error", "unavailable", retry_after_s=2),
    DeadlineExceeded: Outcome(504, "DEADLINE_EXCEEDED", "server_error", "timeout"),
    IncompatibleNode: Outcome(500, "FAILED_PRECONDITION", "server_error", "incompatible_node"),
    NotAllowed: Outcome(500, "PERMISSION_DENIED", "server_error", "not_allowed"),
    ConfigError: Outcome(500, "ALREADY_EXISTS", "server_error", "configuration"),
    NotANumber: Outcome(500, "DATA_LOSS", "server_error", "not_a_number"),
    Internal: Outcome(500, "INTERNAL", "server_error", "internal_error"),
}


def outcome_of(error: BaseException) -> Outcome:
    """The table's row for an error, a bug's row for anything that is not ours."""
    return OUTCOMES.get(type(error), OUTCOMES[Internal])


def error_from_grpc(status: str, message: str, param: str | None = None) -> KvferryError:
    """The error that a peer meant by a gRPC status (its name), details and field at fault; `Unavailable` for any other
    status, which is what a connection that broke gives (UNAVAILABLE, CANCELLED, UNKNOWN)."""
    for kind, outcome in OUTCOMES.items():
        if outcome.grpc == status:
            return InvalidRequest(message, param) if kind is InvalidRequest else kind(message)
    return Unavailable(message)
