"""What of a step's token budget each sequence gets, where it is not enough for all."""

from kvferry.engine.scheduling.fairness import RANK, Tenants
from kvferry.engine.sequence import Sequence

Chunk = tuple[Sequence, int]  # a sequence, and the token that its row ends before


def share_out(
    decoding: list[Sequence], extending: list[Sequence], tenants: Tenants, budget: int
) -> tuple[list[Sequence], list[Chunk]]:
    """Who decodes, and who computes a chunk, up to which token.

    Tenants get their shares first. Within one, every decoding sequence gets its token, and the prompts what is left, in
    rank. Where its share does not do for that, all its sequences take turns, the most urgent before others; a prompt's
    turn is up to half of the share.
    """
    wanted: dict[str, int] = {}
    for seq in decoding + extending:
        wanted[seq.tenant] = wanted.get(seq.tenant, 0) + len(seq.token_ids) - seq.num_computed
    shares = tenants.split(budget, wanted)
    chosen: list[Sequence] = []
    chunks: list[Chunk] = []
    for name in wanted:
        share = most = shares[name]
        singles = [seq for seq in decoding if seq.tenant == name]
        prompts = sorted((seq for seq in extending if seq.tenant == name), key=RANK)
        order = [(seq, False) for seq in singles] + [(seq, True) for seq in prompts]
        if share < len(singles) + bool(prompts):
            last = tenants[name].last_turn
            order.sort(key=lambda pair, last=last: (pair[0].priority, pair[0].id <= last, pair[0].id))
            most = max(1, share // 2)
        for seq, is_chunk in order:
            if share <= 0:
                break
            tenants[name].last_turn = seq.id
            end = seq.next_chunk(min(share, most)) if is_chunk else len(seq.token_ids)
            share -= end - seq.num_computed
            if is_chunk:
                chunks.append((seq, end))
            else:
                chosen.append(seq)
    return chosen, chunks
