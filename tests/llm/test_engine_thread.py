import asyncio
import threading
import time

import pytest
import torch

from tests.llm.fake import FakeEngine, Letters, writes
from tlk.errors import EngineError
from tlk.llm.engine_thread import Command, EngineThread
from tlk.llm.inputs import Text
from tlk.llm.requests import Requests
from tlk.runtime.params import SamplingParams

TEXT = Text(Letters())
DEFAULT = SamplingParams()


class Counting:
    """An event loop that counts how often it is woken."""

    def __init__(self, loop):
        self.loop, self.wakes = loop, 0

    def call_soon_threadsafe(self, call, *arguments):
        self.wakes += 1
        self.loop.call_soon_threadsafe(call, *arguments)


def start(loop, take, text="hello"):
    engine = FakeEngine(writes(text))
    thread = EngineThread(engine, Requests(engine, TEXT), torch.device("cpu"), loop, take)
    return engine, thread


def add(key, prompt="p", params=DEFAULT):
    return Command(key, f"id-{key}", TEXT.prepare(prompt, params, DEFAULT))


def run(body):
    asyncio.run(asyncio.wait_for(body(), 20))


def test_one_wake_a_step_for_all_requests():
    async def body():
        news, done = [], asyncio.Event()

        def take(batch):
            news.append(batch)
            if sum(getattr(n, "finished", True) for b in news for n in b.values()) == 50:
                done.set()

        loop = Counting(asyncio.get_running_loop())
        engine, thread = start(loop, take, "hello world")
        for i in range(50):
            thread.send(add(i))
        await done.wait()
        thread.close()
        assert loop.wakes <= engine.calls["step"]
        assert {key for batch in news for key in batch} == set(range(50))

    run(body)


def test_a_loop_that_does_not_look_gets_the_latest_only():
    async def body():
        news = []
        engine, thread = start(asyncio.get_running_loop(), news.append)
        thread.send(add("k"))
        while engine.calls["step"] < 8:  # blocks the loop, as a busy task would
            pass
        await asyncio.sleep(0.05)
        thread.close()
        assert len(news) == 1 and news[0]["k"].finished
        assert news[0]["k"].outputs[0].text == "hello"

    run(body)


def test_states_handed_over_do_not_change():
    async def body():
        news = []
        engine, thread = start(asyncio.get_running_loop(), news.append)
        thread.send(add("k"))
        while not (news and news[-1]["k"].finished):
            await asyncio.sleep(0)
        thread.close()
        lengths = [len(n["k"].outputs[0].token_ids) for n in news]
        assert lengths == sorted(lengths) and len({id(n["k"]) for n in news}) == len(news)
        assert engine.closed

    run(body)


def test_what_the_engine_refuses_is_told_to_one():
    async def body():
        told = {}
        _, thread = start(asyncio.get_running_loop(), told.update)
        thread.send(Command("bad", "1", TEXT.prepare([5] * 99, DEFAULT, DEFAULT)))
        thread.send(add("good"))
        while not (told.get("bad") and getattr(told.get("good"), "finished", False)):
            await asyncio.sleep(0)
        thread.close()
        assert "99 tokens" in str(told["bad"]) and told["good"].outputs[0].text == "hello"

    run(body)


@pytest.mark.parametrize("fault", ["engine", "bug"])
def test_the_end_of_the_engine_is_told_to_all(fault, monkeypatch):
    crashes = []
    monkeypatch.setattr(threading, "excepthook", lambda args: crashes.append(args.exc_value))

    async def body():
        told = {}
        engine, thread = start(asyncio.get_running_loop(), told.update)
        cause = RuntimeError("fault")
        if fault == "engine":
            engine.dead = cause
        else:
            engine.step = lambda: (_ for _ in ()).throw(cause)
        commands = [add("a"), add("b")]
        with thread._changed:  # both are there before the thread looks
            for command in commands:
                thread.send(command)
        while len(told) < 2:
            await asyncio.sleep(0)
        assert all(isinstance(n, EngineError) and n.__cause__ is cause for n in told.values())
        assert len({id(n) for n in told.values()}) == len(told)
        with pytest.raises(EngineError) as raised:
            thread.send(add("c"))
        assert raised.value.__cause__ is cause
        thread.close()
        assert not thread._thread.is_alive()

    run(body)
    assert len(crashes) == (fault == "bug")  # a bug keeps its traceback


def test_close_tells_those_who_wait():
    async def body():
        told = {}
        engine, thread = start(asyncio.get_running_loop(), told.update)
        engine.script = lambda *_: time.sleep(0.01) or 97
        thread.send(add("a"))
        while engine.calls["step"] < 2:
            await asyncio.sleep(0)
        thread.close()
        await asyncio.sleep(0)
        assert str(told["a"]) == "the engine was closed" and engine.closed
        assert engine.calls["abort"] == 1

    run(body)


def test_close_tells_those_who_came_too_late():
    async def body():
        told, gate = {}, threading.Event()
        engine, thread = start(asyncio.get_running_loop(), told.update)
        engine.script = lambda *_: gate.wait(10) and 97
        thread.send(add("a"))
        while not engine.calls["step"]:
            await asyncio.sleep(0)
        thread.send(add("b"))
        closing = threading.Thread(target=thread.close)
        closing.start()
        while not thread._closing:
            await asyncio.sleep(0)
        gate.set()
        closing.join()
        await asyncio.sleep(0)
        assert set(told) == {"a", "b"} and str(told["b"]) == "the engine was closed"

    run(body)


def test_a_new_loop_is_woken_though_the_old_one_never_looked():
    class Asleep:
        def call_soon_threadsafe(self, call):
            pass

    async def body():
        told = {}
        _, thread = start(Asleep(), told.update)
        thread.send(add("old"))
        while not thread._outbox or not thread._outbox["old"].finished:
            await asyncio.sleep(0)
        thread.attach(asyncio.get_running_loop())
        thread.send(add("new"))
        while not ("new" in told and told["new"].finished):
            await asyncio.sleep(0)
        thread.close()
        assert set(told) == {"new"}

    run(body)


def test_an_idle_thread_sleeps():
    async def body():
        engine, thread = start(asyncio.get_running_loop(), lambda news: None)
        await asyncio.sleep(0.05)
        before = engine.calls["step"]
        await asyncio.sleep(0.05)
        assert engine.calls["step"] == before == 0
        thread.close()

    run(body)


def test_a_closed_loop_aborts_what_it_had_asked_for():
    engine, thread, gate = None, None, threading.Event()

    async def body():
        nonlocal engine, thread
        engine, thread = start(asyncio.get_running_loop(), lambda news: None)
        engine.script = lambda *_: gate.wait(10) and 97
        thread.send(add("a", params=SamplingParams(max_tokens=None)))
        while not engine.calls["step"]:
            await asyncio.sleep(0)

    run(body)
    gate.set()
    until = time.monotonic() + 10
    while engine.calls["abort"] == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert engine.calls["abort"] == 1 and not engine.requests
    thread.close()
