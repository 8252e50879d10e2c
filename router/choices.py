"""From a job's tokens to what its choices say: text as it becomes certain, log probabilities with their tokens."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from kvferry.common.sampling import TokenLogprobs
from kvferry.router.accounting import Record
from kvferry.router.flow import Flow, Job, Progress
from kvferry.router.handover import Piece
from kvferry.router.logprobs import Offsets, Told
from kvferry.router.openai import GenerationRequest
from kvferry.router.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Part:
    """What is new of the choice `index`. The text may lag behind its tokens; the last part, with the finish reason, has
    the rest of it. `told`, where log probabilities were asked for, is of the new tokens, and of an echoed prompt's.
    `stop_reason`: the stop string or the stop token of the client's that ended it."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    told: tuple[Told, ...] = ()
    stop_reason: str | int | None = None


def joined(parts: Iterable[Part], choices: int) -> list[Part]:
    """The parts of each choice as one. Every choice has a last part among them."""
    whole: list[list[Part]] = [[] for _ in range(choices)]
    for part in parts:
        whole[part.index].append(part)
    return [
        Part(
            index,
            "".join([part.text for part in own]),
            tuple(token for part in own for token in part.token_ids),
            own[-1].finish_reason,
            tuple(one for part in own for one in part.told),
            own[-1].stop_reason,
        )
        for index, own in enumerate(whole)
    ]


class Choice:
    """One answer as it is written."""

    def __init__(self, index: int, tokenizer: Tokenizer, asked: GenerationRequest, offset: int):
        """`offset`: how many characters of its text are before its first token."""
        self._index, self._asked = index, asked
        self._detokenizer = tokenizer.detokenizer(asked.stop, asked.include_stop, asked.skip_special_tokens)
        self._before_stops = asked.min_tokens  # tokens that no stop string can end
        self._offsets = Offsets(tokenizer, offset) if asked.logprobs is not None else None
        self.begun = False

    def take(self, piece: Piece) -> Part:
        """What a piece adds. A stop string makes it the last."""
        self.begun = True
        told = self._offsets.tell(piece.token_ids, piece.logprobs) if self._offsets else ()
        ended = piece.finish_reason == "stop"  # by its last token
        shown = piece.token_ids[:-1] if ended and not self._asked.include_stop else piece.token_ids
        text, stopped = self._push(shown)
        if stopped:
            return Part(self._index, text, piece.token_ids, "stop", told, self._detokenizer.stop)
        if piece.finish_reason:
            text += self._detokenizer.finish()
        reason = piece.token_ids[-1] if ended and piece.token_ids[-1] in self._asked.stop_token_ids else None
        return Part(self._index, text, piece.token_ids, piece.finish_reason, told, reason)

    def _push(self, token_ids: tuple[int, ...]) -> tuple[str, bool]:
        """The text of tokens, the first `min_tokens` of the choice without regard to stop strings."""
        early, late = token_ids[: self._before_stops], token_ids[self._before_stops :]
        self._before_stops -= len(early)
        text = self._detokenizer.push(early, may_stop=False)[0] if early else ""
        more, stopped = self._detokenizer.push(late)
        return text + more, stopped


class Telling:
    """One job's answers, for the request that it is part of.

    `first`: the number that its first choice has in the request. `prompt_logprobs` is complete once there is a part.
    """

    def __init__(self, job: Job, record: Record, asked: GenerationRequest, first: int, tokenizer: Tokenizer):
        self.job, self.record = job, record
        self.prompt_logprobs: list[TokenLogprobs] = []
        self._asked, self._first, self.tokenizer = asked, first, tokenizer
        self._prompt, self._prompt_told = "", ()

    async def parts(self, flow: Flow) -> AsyncGenerator[Part, None]:
        """Every choice's parts, each choice's in order. A stop string ends its choice, and the others go on."""
        if self._asked.echo:
            self._prompt = await asyncio.to_thread(self._prompt_text)
        progress = Progress(self.job)
        choices = [
            Choice(self._first + choice, self.tokenizer, self._asked, len(self._prompt)) for choice in self.job.choices
        ]
        async with aclosing(flow.run(self.job, self.record, progress)) as pieces:
            async for piece in pieces:
                self.prompt_logprobs += piece.prompt_logprobs
                if not piece.token_ids:
                    continue
                choice = choices[piece.choice]
                if self._asked.echo and not choice.begun:
                    yield await self._echo(self._first + piece.choice)
                part = choice.take(piece)
                if self._asked.max_tokens == 0:  # the token was drawn for the prompt's sake alone
                    part = Part(part.index, "", (), "length")
                if part.finish_reason:
                    progress.end(piece.choice)
                self.record.output_tokens += len(part.token_ids)
                yield part

    def _prompt_text(self) -> str:
        """The prompt as the client wrote it; one of token ids, as it reads."""
        prompt = self._asked.prompts[self._first // self._asked.n]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(self.job.token_ids)

    async def _echo(self, index: int) -> Part:
        """The prompt, before a choice's own text."""
        if self._asked.logprobs is not None and not self._prompt_told:
            told = [None, *self.prompt_logprobs]
            self._prompt_told = await asyncio.to_thread(Offsets(self.tokenizer).tell, self.job.token_ids, told)
        return Part(index, self._prompt, (), told=self._prompt_told)


def tellings(
    jobs: Sequence[Job], records: Sequence[Record], asked: GenerationRequest, tokenizer: Tokenizer
) -> list[Telling]:
    """One for each job. Choices are numbered as OpenAI does: the first prompt's, then the second's, and so on."""
    return [
        Telling(job, record, asked, number * asked.n, tokenizer)
        for number, (job, record) in enumerate(zip(jobs, records, strict=True))
    ]
