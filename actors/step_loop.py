"""One thread that owns a scoring engine and steps it for all calls together.

A call puts its texts into the engine and waits for their states. Calls that arrive meanwhile add theirs before
the next step, so the engine batches texts of several calls.

The last bits of a state can depend on the texts in its batch. A loop in lock-step therefore computes one call after
the other, and all texts of a call are in the engine before its first step: timing decides nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from distill.errors import NO_VALUE, first_line
from distill.interfaces import EngineDied, Tokens

if TYPE_CHECKING:
    from torch import Tensor

AFTER_DEATH = "check whether the machine ran out of memory (dmesg), then resume the run"
"""The remedy of an engine's death."""

_CLOSE_AFTER_S = 10.0
"""How long the step under way may take before :meth:`StepLoop.close` gives up waiting for it."""


class SteppedEngine(Protocol):
    """What the loop steps; it calls every method in its own thread."""

    def add(self, request_id: str, prompt: Tokens, response: Tokens) -> None:
        """Accept a text. An exception refuses it, and fails the call that it belongs to."""
        ...

    def step(self) -> Iterable[tuple[str, Tensor | Exception]]:
        """Compute for a while; returns the texts that finished, with their states [T, D] or why they have none.

        An exception means that the engine has died.
        """
        ...

    def abort(self, request_ids: list[str]) -> None:
        """Drop texts. Some of them may have finished in the step whose results are being taken."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


@dataclass(eq=False)
class _Call:
    """The texts of one call, and what is known of them."""

    texts: list[tuple[Tokens, Tokens]]
    convert: Callable[[Tensor], Any]
    done: Future[list[Any]] = field(default_factory=Future)
    places: dict[str, int] = field(default_factory=dict)
    """Where the result of each request in the engine belongs."""
    results: list[Any] = field(default_factory=list)


class StepLoop:
    """Runs the thread; its coroutines are called on an event loop."""

    def __init__(self, name: str, *, lock_step: bool = False) -> None:
        """``name``: the engine's name in errors. ``lock_step``: calls do not share steps."""
        self._name = name
        self._lock_step = lock_step
        self._inbox: SimpleQueue[_Call | None] = SimpleQueue()
        """New calls; None ends the thread."""
        self._calls: set[_Call] = set()
        """Calls without a result, also those that are still in the inbox."""
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        """Guards the two above against a call that comes while the loop ends."""
        self._in_engine: dict[str, _Call] = {}
        """The unfinished requests of the engine. Only the thread uses it."""
        self._num_requests = 0
        self.num_finished = 0
        """Texts that have left the engine."""
        self._thread: threading.Thread | None = None

    async def start(self, start: Callable[[], SteppedEngine]) -> None:
        """Build the engine in the thread; returns when it can score. Raises what ``start`` raises."""
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(start, started), name=self._name, daemon=True)
        self._thread.start()
        await asyncio.wrap_future(started)

    async def call(
        self, prompts: Sequence[Tokens], responses: Sequence[Tokens], convert: Callable[[Tensor], Any]
    ) -> list[Any]:
        """Score texts; returns ``convert`` of each one's states, in order. The thread calls it.

        Raises: EngineDied; RuntimeError after :meth:`close`; what the engine, or ``convert``, raises for a text.
        """
        call = _Call(list(zip(prompts, responses, strict=True)), convert)
        call.results = [None] * len(call.texts)
        with self._lock:
            if self._failure is not None:
                raise _again(self._failure)
            self._calls.add(call)
        call.done.add_done_callback(lambda _: self._calls.discard(call))
        self._inbox.put(call)
        return await asyncio.wrap_future(call.done)  # cancelling this cancels `call.done`

    def fail(self, failure: Exception) -> None:
        """Fail all calls, also later ones; any thread may call this. The first failure stays."""
        with self._lock:
            self._failure = self._failure or failure
            calls = list(self._calls)
        for call in calls:
            _fail(call, _again(self._failure))

    async def close(self) -> None:
        """Fail the calls under way, and end the thread after its current step."""
        self.fail(RuntimeError(f"the {self._name} was closed"))
        self._inbox.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, _CLOSE_AFTER_S)

    def _run(self, start: Callable[[], SteppedEngine], started: Future[None]) -> None:
        try:
            engine = start()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            while self._admit(engine):
                for request_id, states in engine.step():
                    self._finish(engine, request_id, states)
        except Exception as error:
            died = EngineDied(
                self._name, NO_VALUE, f"live; a step of it failed ({first_line(error)})", AFTER_DEATH
            )
            died.__cause__ = error
            self.fail(died)
        finally:
            engine.close()

    def _admit(self, engine: SteppedEngine) -> bool:
        """Abort the calls that were given up and add new ones; sleeps while there are none. False: end."""
        for call in {call for call in self._in_engine.values() if call.done.done()}:
            self._drop(engine, call)
        while True:
            if self._lock_step and self._in_engine:
                return True
            try:
                call = self._inbox.get(block=not self._in_engine)
            except Empty:
                return True
            if call is None:
                return False
            self._add(engine, call)

    def _add(self, engine: SteppedEngine, call: _Call) -> None:
        if call.done.done():
            return
        try:
            for place, (prompt, response) in enumerate(call.texts):
                request_id = str(self._num_requests)
                self._num_requests += 1
                engine.add(request_id, prompt, response)
                call.places[request_id] = place
                self._in_engine[request_id] = call
        except Exception as error:
            self._drop(engine, call)
            _fail(call, error)
        self._resolve_if_complete(call)

    def _finish(self, engine: SteppedEngine, request_id: str, states: Tensor | Exception) -> None:
        """Take the states of a text. A failure ends its call only."""
        call = self._in_engine.pop(request_id, None)
        if call is None:  # dropped since the step began
            return
        self.num_finished += 1
        place = call.places.pop(request_id)
        try:
            if isinstance(states, Exception):
                raise states
            call.results[place] = call.convert(states)
        except Exception as error:
            self._drop(engine, call)
            _fail(call, error)
        self._resolve_if_complete(call)

    def _drop(self, engine: SteppedEngine, call: _Call) -> None:
        request_ids = list(call.places)
        for request_id in request_ids:
            del self._in_engine[request_id]
        call.places.clear()
        engine.abort(request_ids)

    def _resolve_if_complete(self, call: _Call) -> None:
        if not call.places:
            with suppress(InvalidStateError):  # cancelled or failed meanwhile
                call.done.set_result(call.results)


def _fail(call: _Call, error: Exception) -> None:
    with suppress(InvalidStateError):
        call.done.set_exception(error)


def _again(failure: Exception) -> Exception:
    """Return a new exception for every call, because raising one adds to its traceback."""
    error = type(failure)(*failure.args)
    error.__cause__ = failure
    return error
