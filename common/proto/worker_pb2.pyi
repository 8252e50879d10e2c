from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ForgetRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class Forgotten(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Subscription(_message.Message):
    __slots__ = ("subscriber",)
    SUBSCRIBER_FIELD_NUMBER: _ClassVar[int]
    subscriber: str
    def __init__(self, subscriber: _Optional[str] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("kv_heads", "layers", "block_size", "head_dim", "dtype")
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    kv_heads: int
    layers: int
    block_size: int
    head_dim: int
    dtype: str
    def __init__(self, kv_heads: _Optional[int] = ..., layers: _Optional[int] = ..., block_size: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("role", "model", "fingerprint", "layout", "vocab_size", "max_model_len", "draining", "waiting", "running", "waiting_tokens", "free_blocks", "total_blocks", "streams", "tasks", "prefill_tokens_per_s", "pull_bytes_per_s", "preemptions", "pulled_bytes", "published_bytes", "bad_blocks", "node", "served_model_name", "tokenizer", "other_names", "max_choices", "clock", "version", "without_store", "certificate_problem")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    PULL_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PULLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BAD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    SERVED_MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    OTHER_NAMES_FIELD_NUMBER: _ClassVar[int]
    MAX_CHOICES_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_STORE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    role: str
    model: str
    fingerprint: bytes
    layout: Layout
    vocab_size: int
    max_model_len: int
    draining: bool
    waiting: int
    running: int
    waiting_tokens: int
    free_blocks: int
    total_blocks: int
    streams: int
    tasks: int
    prefill_tokens_per_s: float
    pull_bytes_per_s: float
    preemptions: int
    pulled_bytes: int
    published_bytes: int
    bad_blocks: int
    node: str
    served_model_name: str
    tokenizer: str
    other_names: _containers.RepeatedScalarFieldContainer[str]
    max_choices: int
    clock: float
    version: str
    without_store: bool
    certificate_problem: str
    def __init__(self, role: _Optional[str] = ..., model: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., draining: bool = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., free_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., streams: _Optional[int] = ..., tasks: _Optional[int] = ..., prefill_tokens_per_s: _Optional[float] = ..., pull_bytes_per_s: _Optional[float] = ..., preemptions: _Optional[int] = ..., pulled_bytes: _Optional[int] = ..., published_bytes: _Optional[int] = ..., bad_blocks: _Optional[int] = ..., node: _Optional[str] = ..., served_model_name: _Optional[str] = ..., tokenizer: _Optional[str] = ..., other_names: _Optional[_Iterable[str]] = ..., max_choices: _Optional[int] = ..., clock: _Optional[float] = ..., version: _Optional[str] = ..., without_store: bool = ..., certificate_problem: _Optional[str] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "seed", "choice", "min_tokens", "ignore_eos", "stop_token_ids", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "bad_words", "n", "logprobs", "prompt_logprobs")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    choice: int
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: _containers.RepeatedCompositeFieldContainer[TokenBias]
    bad_words: _containers.RepeatedCompositeFieldContainer[BadWord]
    n: int
    logprobs: int
    prompt_logprobs: int
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., choice: _Optional[int] = ..., min_tokens: _Optional[int] = ..., ignore_eos: bool = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Iterable[_Union[TokenBias, _Mapping]]] = ..., bad_words: _Optional[_Iterable[_Union[BadWord, _Mapping]]] = ..., n: _Optional[int] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class TokenBias(_message.Message):
    __slots__ = ("token_id", "bias")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    bias: float
    def __init__(self, token_id: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class BadWord(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Sequence(_message.Message):
    __slots__ = ("request_id", "chain_key", "cache_salt", "fingerprint", "token_ids", "prompt_len", "sampling", "priority", "weight", "seal_key", "sealed")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHAIN_KEY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SEAL_KEY_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    chain_key: bytes
    cache_salt: str
    fingerprint: bytes
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_len: int
    sampling: Sampling
    priority: int
    weight: float
    seal_key: bytes
    sealed: bool
    def __init__(self, request_id: _Optional[str] = ..., chain_key: _Optional[bytes] = ..., cache_salt: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., token_ids: _Optional[_Iterable[int]] = ..., prompt_len: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., priority: _Optional[int] = ..., weight: _Optional[float] = ..., seal_key: _Optional[bytes] = ..., sealed: bool = ...) -> None: ...

class FillCommand(_message.Message):
    __slots__ = ("open",)
    OPEN_FIELD_NUMBER: _ClassVar[int]
    open: Sequence
    def __init__(self, open: _Optional[_Union[Sequence, _Mapping]] = ...) -> None: ...

class Reuse(_message.Message):
    __slots__ = ("gpu_tokens", "host_tokens", "computed_tokens", "pulled_bytes", "published_bytes")
    GPU_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HOST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PULLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    gpu_tokens: int
    host_tokens: int
    computed_tokens: int
    pulled_bytes: int
    published_bytes: int
    def __init__(self, gpu_tokens: _Optional[int] = ..., host_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., pulled_bytes: _Optional[int] = ..., published_bytes: _Optional[int] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("logprob", "rank", "top_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    rank: int
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., rank: _Optional[int] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("token_id", "finish_reason", "logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    finish_reason: str
    logprobs: TokenLogprobs
    def __init__(self, token_id: _Optional[int] = ..., finish_reason: _Optional[str] = ..., logprobs: _Optional[_Union[TokenLogprobs, _Mapping]] = ...) -> None: ...

class FillReport(_message.Message):
    __slots__ = ("committed_blocks", "first_tokens", "done", "reuse", "started", "holder")
    COMMITTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    REUSE_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    committed_blocks: int
    first_tokens: _containers.RepeatedCompositeFieldContainer[FirstToken]
    done: bool
    reuse: Reuse
    started: bool
    holder: str
    def __init__(self, committed_blocks: _Optional[int] = ..., first_tokens: _Optional[_Iterable[_Union[FirstToken, _Mapping]]] = ..., done: bool = ..., reuse: _Optional[_Union[Reuse, _Mapping]] = ..., started: bool = ..., holder: _Optional[str] = ...) -> None: ...

class ContinueCommand(_message.Message):
    __slots__ = ("open", "progress", "end_choice")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    END_CHOICE_FIELD_NUMBER: _ClassVar[int]
    open: ContinueOpen
    progress: FillProgress
    end_choice: EndChoice
    def __init__(self, open: _Optional[_Union[ContinueOpen, _Mapping]] = ..., progress: _Optional[_Union[FillProgress, _Mapping]] = ..., end_choice: _Optional[_Union[EndChoice, _Mapping]] = ...) -> None: ...

class ContinueOpen(_message.Message):
    __slots__ = ("sequence", "expects_fill", "subscriber", "stream")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EXPECTS_FILL_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIBER_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    sequence: Sequence
    expects_fill: bool
    subscriber: str
    stream: int
    def __init__(self, sequence: _Optional[_Union[Sequence, _Mapping]] = ..., expects_fill: bool = ..., subscriber: _Optional[str] = ..., stream: _Optional[int] = ...) -> None: ...

class FillProgress(_message.Message):
    __slots__ = ("committed_blocks", "first_tokens", "done", "holder")
    COMMITTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    committed_blocks: int
    first_tokens: _containers.RepeatedCompositeFieldContainer[FirstToken]
    done: bool
    holder: str
    def __init__(self, committed_blocks: _Optional[int] = ..., first_tokens: _Optional[_Iterable[_Union[FirstToken, _Mapping]]] = ..., done: bool = ..., holder: _Optional[str] = ...) -> None: ...

class EndChoice(_message.Message):
    __slots__ = ("choice",)
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    choice: int
    def __init__(self, choice: _Optional[int] = ...) -> None: ...

class ContinueEnd(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StepEvents(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[ContinueEvent]
    def __init__(self, events: _Optional[_Iterable[_Union[ContinueEvent, _Mapping]]] = ...) -> None: ...

class ContinueEvent(_message.Message):
    __slots__ = ("admitted", "restored", "tokens", "prompt_logprobs", "finished", "stream")
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    admitted: Admitted
    restored: Restored
    tokens: Tokens
    prompt_logprobs: PromptLogprobs
    finished: Finished
    stream: int
    def __init__(self, admitted: _Optional[_Union[Admitted, _Mapping]] = ..., restored: _Optional[_Union[Restored, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[PromptLogprobs, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., stream: _Optional[int] = ...) -> None: ...

class Admitted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Restored(_message.Message):
    __slots__ = ("reuse",)
    REUSE_FIELD_NUMBER: _ClassVar[int]
    reuse: Reuse
    def __init__(self, reuse: _Optional[_Union[Reuse, _Mapping]] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("token_ids", "finish_reason", "choice", "logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: str
    choice: int
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[str] = ..., choice: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, tokens: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
