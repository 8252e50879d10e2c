"""One token stream's state in the engine."""

from dataclasses import dataclass, field
from enum import Enum

from kvferry.common.hashing import BlockName, CacheScope
from kvferry.common.sampling import SamplingParams
from kvferry.engine.batch import Draw


class Status(Enum):
    WAITING = "waiting"  # holds nothing; wants room in the pool
    RESTORING = "restoring"  # holds blocks for all its tokens; its prefix is being pulled into them
    RUNNING = "running"  # gets rows in steps
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Owned by the scheduler from `add` until it is finished or withdrawn; only `token_ids`, `filled` and
    `num_computed` are also written by who restores it.

    The tokens of a sequence, and who has computed their KV:

        | computed or reused   | filled blocks, a hole before each | not computed yet |
        0              num_computed                                      len(token_ids)

    `filled` holds the indices of blocks past `num_computed` whose KV is in place already.
    `names[i]` is the name of full block i; `block_table[i]` the pool block for tokens `16 i .. 16 i + 15`.
    `limit`: how many tokens to generate at most here (1 for a fill), besides what the parameters say.
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
    names: list[BlockName] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    filled: set[int] = field(default_factory=set)
    num_computed: int = 0
    num_reused: int = 0  # tokens found in the page pool when last admitted
    status: Status = Status.WAITING
    admissions: int = 0
    in_flight: bool = False
    withdrawn: bool = False
    generated_here: int = 0

    def __post_init__(self) -> None:
        self.extend_names()

    @property
    def block_size(self) -> int:
        return self.scope.layout.block_size

    @property
    def blocks_needed(self) -> int:
        """Blocks for every known token and the one after."""
        return len(self.token_ids) // self.block_size + 1

    @property
    def blocks_computed(self) -> int:
        return self.num_computed // self.block_size

    @property
    def reuse_cap(self) -> int:
        """How many blocks may be reused: at least one token is left to compute logits from."""
        return (len(self.token_ids) - 1) // self.block_size

    def extend_names(self) -> None:
        """Name the full blocks that have no name yet."""
        start = len(self.names) * self.block_size
        if len(self.token_ids) - start >= self.block_size:
            parent = self.names[-1] if self.names else None
            self.names += self.scope.chain(self.token_ids[start:], parent)

    def append(self, token: int) -> None:
        self.token_ids.append(token)
        self.extend_names()

    def fill(self, index: int) -> None:
        """Block `index`, below the reuse cap, has its KV in place; step over it when its turn comes."""
        self.filled.add(index)
        self.advance(0)

    def advance(self, tokens: int) -> None:
        """`tokens` more have been computed; step over the blocks behind them that are in place."""
        self.num_computed += tokens
        while self.num_computed % self.block_size == 0 and self.blocks_computed in self.filled:
            self.filled.discard(self.blocks_computed)
            self.num_computed += self.block_size

    def next_chunk(self, budget: int) -> int:
        """Where the next row ends, given a budget of tokens: it stops before a filled block."""
        end = min(len(self.token_ids), self.num_computed + budget)
        return min([end, *(i * self.block_size for i in self.filled)])

    def draw(self) -> Draw:
        """What choosing the next token needs."""
        return Draw(self.params, len(self.token_ids), len(self.token_ids) - self.prompt_len, self.stop_ids)

    def finish_reason(self, token: int) -> str | None:
        """Why `token`, already appended, ends the sequence: "stop", "length", or None."""
        if token in self.stop_ids and len(self.token_ids) - self.prompt_len > self.params.min_tokens:
            return "stop"
        generated = len(self.token_ids) - self.prompt_len
        if generated >= self.params.max_tokens or len(self.token_ids) >= self.max_model_len:
            return "length"
        return None
