"""One token stream's state in the engine."""

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from kvferry.common.hashing import BlockName, CacheScope, Span
from kvferry.common.sampling import SamplingParams, TokenLogprobs
from kvferry.engine.batch import Draw

Sink = Callable[["TokenEvent"], None]


class Status(Enum):
    WAITING = "waiting"  # holds nothing; wants room in the pool
    RESTORING = "restoring"  # holds blocks for all its tokens; its prefix is being pulled into them
    RUNNING = "running"  # gets rows in steps
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Owned by the scheduler from `add` until it is finished or withdrawn; only `token_ids`, `filled`, `first_tokens`
    and `num_computed` are also written by who restores it.

    The tokens of a sequence, and who has computed their KV:

        | computed or reused   | filled blocks, a hole before each | not computed yet |
        0              num_computed                                      len(token_ids)

    `filled` holds the indices of blocks past `num_computed` whose KV is in place already.
    `names[i]` is the name of full block i; `block_table[i]` the pool block for tokens `16 i .. 16 i + 15`.
    `limit`: how many tokens to generate at most here (1 for a fill), besides what the parameters say.
    `sink` is told what each step did for it.
    Of one tenant's sequences the lower `priority` goes first; `weight` is the tenant's share among tenants.

    With `params.n` > 1 it forks into n sequences of one choice each once its prompt is computed, itself the first;
    their ids follow its own, and `group` is its id in all of them. `first_tokens`, if set, are (choice, token) pairs
    that are known, and sent, already: it forks into those.
    """

    id: int
    request_id: str
    scope: CacheScope
    token_ids: list[int]
    prompt_len: int
    params: SamplingParams
    stop_ids: tuple[int, ...]
    limit: int
    max_model_len: int
    priority: int = 0
    weight: float = 1.0
    group: int = 0
    sink: Sink = field(default=lambda event: None, repr=False)
    names: list[BlockName] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    filled: set[int] = field(default_factory=set)
    num_computed: int = 0
    num_reused: int = 0  # tokens found in the page pool when last admitted
    status: Status = Status.WAITING
    admissions: int = 0
    withdrawn: bool = False
    first_tokens: tuple[tuple[int, int], ...] = ()
    scored: int = 0  # prompt tokens whose log probability has been told, besides the first, which has none
    shares_tail: bool = False  # its last, partial block may stand in other tables too
    table_row: int = -1  # in the scheduler's block tables
    tenant: str = field(init=False)
    block_size: int = field(init=False)
    draws: list[Draw] = field(init=False)  # one for each choice
    stop_len: int = field(init=False)  # at this many tokens the answer ends, whatever they are
    end_len: int = 0  # and at this many the work here, if that is earlier
    due: int = field(init=False)  # at this many tokens there is something to do besides going on

    def __post_init__(self) -> None:
        self.tenant = self.scope.keys.pseudonym
        self.block_size = self.scope.layout.block_size
        self.group = self.group or self.id
        self.stop_len = min(self.prompt_len + self.params.max_tokens, self.max_model_len)
        self.end_len = self.end_len or min(self.stop_len, len(self.token_ids) + self.limit)
        first, n = self.params.choice, self.params.n
        each = [dataclasses.replace(self.params, choice=c, n=1) for c in range(first, first + n)]
        self.draws = [Draw(params, self.stop_ids, self.token_ids, self.prompt_len) for params in each]
        self.extend_names()
        self.set_due()

    @property
    def rank(self) -> tuple[int, int]:
        """Among the sequences of one tenant: the lower goes first."""
        return (self.priority, self.id)

    @property
    def blocks_needed(self) -> int:
        """Blocks for every known token and the one after."""
        return len(self.token_ids) // self.block_size + 1

    @property
    def blocks_computed(self) -> int:
        return self.num_computed // self.block_size

    @property
    def reuse_cap(self) -> int:
        """How many blocks may be reused: at least one token is left to compute logits from; none where every prompt
        token's logits are asked for."""
        return 0 if self.params.prompt_logprobs is not None else (len(self.token_ids) - 1) // self.block_size

    @property
    def seal(self) -> bytes | None:
        """The key that its blocks are sealed with; None where they are plain."""
        return self.scope.keys.seal

    def span(self, first: int, end: int) -> Span:
        """Its named blocks `first .. end - 1`."""
        return Span.of(self.names, self.scope.root(), first, end)

    def extend_names(self) -> None:
        """Name the full blocks that have no name yet."""
        start = len(self.names) * self.block_size
        if len(self.token_ids) - start >= self.block_size:
            parent = self.names[-1] if self.names else None
            self.names += self.scope.chain(self.token_ids[start:], parent)

    def append(self, token: int) -> None:
        self.token_ids.append(token)
        self.extend_names()
        self.set_due()

    def set_due(self) -> None:
        """The next length at which, if it is decoding, a block has been filled or the end is reached."""
        boundary = (max(len(self.token_ids) - 1, 0) // self.block_size + 1) * self.block_size + 1
        self.due = min(self.end_len, boundary)

    def fill(self, index: int) -> None:
        """Block `index`, below the reuse cap, has its KV in place; step over it when its turn comes."""
        self.filled.add(index)
        self.advance(0)

    def advance(self, tokens: int) -> None:
        """`tokens` more have been computed; step over the blocks behind them that are in place."""
        self.num_computed += tokens
        while self.filled and self.num_computed % self.block_size == 0 and self.blocks_computed in self.filled:
            self.filled.discard(self.blocks_computed)
            self.num_computed += self.block_size

    def next_chunk(self, budget: int) -> int:
        """Where the next row ends, given a budget of tokens: it stops before a filled block."""
        end = min(len(self.token_ids), self.num_computed + budget)
        return min([end, *(i * self.block_size for i in self.filled)])

    def to_score(self, end: int) -> list[int]:
        """The prompt tokens that logits of the positions `scored .. end - 1` speak of."""
        return self.token_ids[self.scored + 1 : min(end, self.prompt_len - 1) + 1]

    def fork(self, offset: int) -> "Sequence":
        """A sequence of the choice `offset` further on, that has the same tokens and stands in the same blocks, as far
        as they are written. Who calls it counts the blocks' new holder."""
        written = -(-self.num_computed // self.block_size)
        return dataclasses.replace(
            self,
            id=self.id + offset,
            params=self.draws[offset].params,
            token_ids=self.token_ids[:],
            names=self.names[:],
            block_table=self.block_table[:written],
            filled=set(),
            first_tokens=(),
            table_row=-1,
        )

    def become(self, offset: int) -> None:
        """Be one choice from here on."""
        self.draws = [self.draws[offset]]
        self.params = self.draws[0].params
        self.first_tokens = ()

    def finish_reason(self, token: int) -> str | None:
        """Why `token`, already appended, ends the answer: "stop", "length", or None."""
        if token in self.stop_ids and len(self.token_ids) - self.prompt_len > self.params.min_tokens:
            return "stop"
        return "length" if len(self.token_ids) >= self.stop_len else None


class TokenEvent(msgspec.Struct, gc=False):  # made for every token: the cheapest there is
    """What a step did for one sequence: it computed something, and if it chose a token, that is `token`.

    `finish_reason` is set with the last token. `prompt_logprobs` are those of the prompt tokens that were scored.
    """

    seq: Sequence
    token: int | None = None
    finish_reason: str | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: Collection[TokenLogprobs] = ()
