"""The clients of the soak: random requests, who leaves early, and what each was answered."""

from __future__ import annotations

import array
import asyncio
import contextlib
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

BUDGETS = 50  # the longest prompt, in budgets
LEAVE = 0.1  # of clients when they are seen in prefill, and as many after some tokens
# Every prompt ends alike: what differs between two answers, attention to the rest has brought.
ENDING = range(2, 10)
CANDIDATES = 8  # best tokens that a request alone reports for each of its own
FOLLOW = 0.6  # of clients ask more once they are answered, or the same once more if they had left
FOLLOW_BUDGETS = 10  # the longest text of one that asks more
TURN = 1_000_000  # added to the number of a client that asks more
PERIOD = 2.0  # seconds for which arrivals keep their rate
RATES = (0.2, 1.0, 2.0)  # times the mean
DRAIN_SECONDS = 90
READ_SECONDS = 0.2
SHOW_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked of the engine.

    Args:
        budget: Tokens that the cascade keeps.
        max_output_tokens: Tokens of the longest answer.
        per_second: Mean rate of arrivals.
        at_once: Requests that may be in flight; arrivals wait beyond.
        sample: Answers that are compared.
        compared_tokens: Most tokens compared of each.
        all_compared: Whether requests past the budget are compared. In bfloat16 another batch
            rounds keys otherwise, other tokens survive, and a random model answers otherwise.
    """

    budget: int
    max_output_tokens: int
    per_second: float
    at_once: int
    sample: int
    compared_tokens: int
    all_compared: bool = True


@dataclass(frozen=True, slots=True)
class Ask:
    """A request and its client.

    Args:
        number: Its seed.
        prompt_tokens: Length of the prompt.
        output_tokens: Length of the answer.
        temperature: 0 is greedy.
        is_hasty: Whether the client leaves as soon as it is seen in prefill.
        enough: Tokens after which the client leaves, or None.
        begin: Tokens before the prompt: all of an earlier request and its answer.
        is_again: Whether its client had left before.
    """

    number: int
    prompt_tokens: int
    output_tokens: int
    temperature: float
    is_hasty: bool
    enough: int | None
    begin: array.array | None = field(default=None, compare=False)
    is_again: bool = False

    @property
    def num_tokens(self) -> int:
        """Length of what is sent."""
        return len(self.begin or ()) + self.prompt_tokens

    @classmethod
    def draw(cls, load: Load, number: int) -> Ask:
        """The client of this number; lengths are as likely in each power of two."""
        source = random.Random(number)
        output_tokens = int(load.max_output_tokens ** source.random())
        fate = source.random()
        # Prefill of the hasty is to last long enough to be seen.
        shortest = 5 * load.budget if fate < LEAVE else 1
        longest = BUDGETS * load.budget
        return cls(
            number=number,
            prompt_tokens=int(shortest * (longest / shortest) ** source.random()),
            output_tokens=output_tokens,
            temperature=0.0 if source.random() < 0.5 else 1.0,
            is_hasty=fate < LEAVE,
            enough=source.randint(1, output_tokens) if LEAVE <= fate < 2 * LEAVE else None,
        )

    def prompt(self, vocabulary: int) -> list[int]:
        """Its token ids."""
        # Python shares small numbers: so prompts in flight weigh little in the memory watched.
        ids = range(2, min(vocabulary, 256))
        tokens = random.Random(~self.number).choices(ids, k=self.prompt_tokens)
        ended = [*tokens[: -len(ENDING)], *ENDING][-self.prompt_tokens :]
        return [*(self.begin or ()), *ended]

    def follow(self, load: Load, vocabulary: int, answer: array.array | None) -> Ask | None:
        """What the client asks next, or None.

        Args:
            load: What clients ask.
            vocabulary: Of the model.
            answer: What it was answered; None if it left before that.
        """
        source = random.Random(-self.number)
        if source.random() >= FOLLOW:
            return None
        if answer is None:
            return replace(self, is_hasty=False, enough=None, is_again=True)
        begin = array.array("i", self.prompt(vocabulary)) + answer
        more = source.randint(1, load.budget)
        follow = replace(self, number=self.number + TURN, prompt_tokens=more, begin=begin)
        return follow if follow.num_tokens <= FOLLOW_BUDGETS * load.budget else None


@dataclass(slots=True)
class Answer:
    """Tokens of an answer, the log-probability of each, and of the best where asked for."""

    tokens: array.array = field(default_factory=lambda: array.array("i"))
    logprobs: array.array = field(default_factory=lambda: array.array("d"))
    candidates: list[dict[int, float]] = field(default_factory=list)
    finished: bool = False
    begun_at: int = 0  # tokens that an earlier request had computed


def number_of(name: str) -> int:
    """The client's number; the engine appends a random suffix to the ids."""
    return int(name.split("-")[0])


class Clients:
    """The clients of one engine, and what they saw.

    Args:
        engine: An `AsyncLLM` with `soak.probe.Probe` in its worker.
        load: What they ask.
        seed: Of the arrivals.
    """

    def __init__(self, engine: Any, load: Load, seed: int) -> None:
        self.engine, self.load = engine, load
        self.vocabulary = engine.model_config.get_vocab_size()
        self.faults: list[str] = []
        self.answers: dict[Ask, Answer] = {}  # greedy and complete
        self.readings: list[tuple[float, dict[str, int]]] = []  # seconds, bytes
        self.asked = self.finished = self.past_budget = self.tokens = self.continued = 0
        self.number = 0
        self._source = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._hasty: dict[int, asyncio.Timeout] = {}

    async def state(self) -> dict[str, Any]:
        """The engine's state, with the memory of this process."""
        (state,) = await self.engine.collective_rpc("soak_state")
        state["memory"]["front end"] = psutil.Process().memory_info().rss
        return state

    async def play(self, seconds: float) -> None:
        """Let requests arrive for some seconds, and wait for the last to end."""
        begin = time.monotonic()
        reading = asyncio.create_task(self._read(begin))
        try:
            await asyncio.wait_for(self._arrive(begin + seconds), seconds + DRAIN_SECONDS)
            while self._tasks:
                left = begin + seconds + DRAIN_SECONDS - time.monotonic()
                done, _ = await asyncio.wait(self._tasks, timeout=left)
                if not done:
                    raise TimeoutError
        except TimeoutError:
            self.faults.append(f"{len(self._tasks)} requests did not end in {DRAIN_SECONDS} s")
            for task in self._tasks:
                task.cancel()
        finally:
            reading.cancel()
            await asyncio.gather(reading, *self._tasks, return_exceptions=True)

    async def _arrive(self, end: float) -> None:
        arrival, rate, until = time.monotonic(), 1.0, 0.0
        while (now := time.monotonic()) < end and not self.faults:
            if now >= until:
                rate, until = self.load.per_second * self._source.choice(RATES), now + PERIOD
            arrival = max(arrival, now - 1) + self._source.expovariate(rate)
            await asyncio.sleep(max(0.0, min(arrival, until, end) - now))
            if arrival > min(until, end):
                arrival = min(until, end)
                continue
            while len(self._tasks) >= self.load.at_once:
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            task = asyncio.create_task(self._serve(Ask.draw(self.load, self.number)))
            self.number += 1
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _read(self, begin: float) -> None:
        shown = -math.inf
        while True:
            state, now = await self.state(), time.monotonic() - begin
            self.readings.append((now, state["memory"]))
            for name in state["in_prefill"]:
                if leaving := self._hasty.pop(number_of(name), None):
                    leaving.reschedule(asyncio.get_running_loop().time())
            if now - shown >= SHOW_SECONDS:
                shown = now
                print(
                    f"{now:4.0f} s: {self.asked} asked, {self.finished} finished, "
                    f"{len(self._tasks)} in flight, {state['free_blocks']} of "
                    f"{state['pool_blocks']} blocks free, {len(state['preempted'])} preempted"
                )
            await asyncio.sleep(READ_SECONDS)

    async def _serve(self, ask: Ask | None) -> None:
        while ask is not None and not self.faults:
            answer = await self._ask(ask)
            tokens = answer.tokens if answer is not None and answer.finished else None
            ask = ask.follow(self.load, self.vocabulary, tokens)

    async def _ask(self, ask: Ask) -> Answer | None:
        self.asked += 1
        try:
            async with asyncio.timeout(None) as patience:
                if ask.is_hasty:
                    self._hasty[ask.number] = patience
                answer = await self.answer(ask, f"{ask.number}-{int(ask.is_again)}")
        except TimeoutError:
            return None
        except Exception as error:
            self.faults.append(f"request {ask.number} failed: {error!r}")
            return None
        finally:
            self._hasty.pop(ask.number, None)
        if not answer.finished:
            return answer
        self.finished += 1
        self.past_budget += ask.num_tokens > self.load.budget
        if len(answer.tokens) != ask.output_tokens:
            self.faults.append(
                f"request {ask.number}: {len(answer.tokens)} tokens, not {ask.output_tokens}"
            )
        elif ask.temperature == 0:
            self.answers[ask] = answer
        return answer

    async def answer(
        self, ask: Ask, name: str, *, candidates: int = 0, most: int = 1 << 30
    ) -> Answer:
        """Send a request and read its answer until it ends or its client has had enough.

        Args:
            ask: The request.
            name: Its id.
            candidates: Best tokens to report for each of its own.
            most: Tokens to generate at most.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=ask.temperature,
            max_tokens=min(ask.output_tokens, most),
            ignore_eos=True,
            detokenize=False,
            logprobs=candidates,
            output_kind=RequestOutputKind.DELTA,
        )
        answer = Answer()
        prompt = {"prompt_token_ids": ask.prompt(self.vocabulary)}
        async with contextlib.aclosing(self.engine.generate(prompt, sampling, name)) as outputs:
            async for output in outputs:
                (new,) = output.outputs
                answer.tokens.extend(new.token_ids)
                for token, step in zip(new.token_ids, new.logprobs, strict=True):
                    answer.logprobs.append(step[token].logprob)
                    if candidates:
                        answer.candidates.append({t: given.logprob for t, given in step.items()})
                if ask.enough is not None and len(answer.tokens) >= ask.enough:
                    break
                answer.finished = output.finished
                answer.begun_at = output.num_cached_tokens or 0
        self.tokens += ask.num_tokens + len(answer.tokens)
        self.continued += answer.begun_at > 0
        bad = sum(not math.isfinite(logprob) for logprob in answer.logprobs)
        if bad:
            self.faults.append(f"request {name}: {bad} log-probabilities are not finite")
        return answer

    def sample(self, preempted: Sequence[str]) -> list[Ask]:
        """Requests to compare: some were preempted, some went on, some are past the budget.

        Only of those that may be compared.
        """
        names = set(map(number_of, preempted))
        asks = [
            ask
            for ask in self.answers
            if self.load.all_compared or ask.num_tokens + ask.output_tokens <= self.load.budget
        ]
        self._source.shuffle(asks)
        part = self.load.sample // 3
        first = [ask for ask in asks if ask.number in names][:part]
        second = [ask for ask in asks if self.answers[ask].begun_at][:part]
        third = [ask for ask in asks if ask.num_tokens > self.load.budget][:part]
        return list(dict.fromkeys([*first, *second, *third, *asks]))[: self.load.sample]

    async def repeat(self, ask: Ask, name: str) -> Answer:
        """What a request of the sample gets once more."""
        name = f"{name}-{ask.number}"
        most = self.load.compared_tokens
        return await self.answer(ask, name, candidates=CANDIDATES, most=most)
