"""What a request must be, so that no step can fail on it: a step that fails, fails for everybody in it."""

import math

from kvferry.common.errors import InvalidRequest
from kvferry.common.sampling import WEIGHTS, SamplingParams

UNIT = (0.0, 1.0)
ANY = (-math.inf, math.inf)
POSITIVE = (math.ulp(0.0), math.inf)
RANGES = {
    "temperature": (0.0, math.inf),
    "top_p": UNIT,
    "min_p": UNIT,
    "presence_penalty": ANY,
    "frequency_penalty": ANY,
    "repetition_penalty": POSITIVE,
}


def check_request(
    token_ids: list[int],
    prompt_len: int,
    params: SamplingParams,
    weight: float,
    vocab: int,
    longest: int,
    max_num_seqs: int,
) -> None:
    """Raises InvalidRequest with one sentence. `weight` is the tenant's share; `longest` is the model's length, prompt
    and answer together."""
    if not token_ids:
        raise InvalidRequest("the prompt is empty; send at least one token", "prompt")
    if not 0 < prompt_len <= len(token_ids):
        raise InvalidRequest(f"{prompt_len} prompt tokens of {len(token_ids)} in all cannot be")
    if len(token_ids) >= longest:
        raise InvalidRequest(f"the prompt has {len(token_ids)} tokens; this model takes {longest - 1}", "prompt")
    named = {
        "prompt": token_ids,
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": [token for token, _ in params.logit_bias],
        "bad_words": [token for word in params.bad_words for token in word],
    }
    for field, ids in named.items():
        if ids and not 0 <= min(ids) <= max(ids) < vocab:
            raise InvalidRequest(f"a token id of {field} is outside the model's vocabulary of {vocab}", field)
    values = [(field, getattr(params, field), *bounds) for field, bounds in RANGES.items()]
    values += [("logit_bias", bias, *ANY) for _, bias in params.logit_bias]
    values.append(("weight", weight, *WEIGHTS))
    for field, value, least, most in values:
        if not (least <= value <= most and math.isfinite(value)):
            raise InvalidRequest(f"{field} is {value}, which cannot be", field)
    for field in ("logprobs", "prompt_logprobs"):
        if not 0 <= (getattr(params, field) or 0) <= vocab:
            raise InvalidRequest(f"{field} asks for more tokens than the model's vocabulary of {vocab} has", field)
    if not 1 <= params.n <= max_num_seqs:
        raise InvalidRequest(f"n is {params.n}; this node runs 1 to {max_num_seqs} at once", "n")
    if not all(params.bad_words):
        raise InvalidRequest("a bad word must have a token", "bad_words")
