import asyncio
import gc
import random
import threading
import time
from itertools import pairwise

import pytest
import torch

from tests.llm.fake import frontend
from tests.llm.models import make
from tlk import LLM, AsyncLLM, SamplingParams
from tlk.errors import EngineError
from tlk.runtime.params import SamplingParams as Params

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def run(body, *arguments):
    result = asyncio.run(asyncio.wait_for(body(*arguments), 100))
    assert "tlk-engine" not in {thread.name for thread in threading.enumerate()}
    return result


async def last(stream):
    return [output async for output in stream][-1]


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_outputs_grow_to_what_llm_gives(device):
    with make(LLM, device=device) as llm:
        (expected,) = llm.generate("def fibonacci(", GREEDY, use_tqdm=False)

    async def body():
        async with make(AsyncLLM, device=device) as llm:
            seen = [output async for output in llm.generate("def fibonacci(", GREEDY, "mine")]
        texts = [o.outputs[0].text for o in seen]
        assert all(later.startswith(text) for text, later in pairwise(texts))
        assert [o.finished for o in seen] == [False] * (len(seen) - 1) + [True]
        assert {o.request_id for o in seen} == {"mine"}
        assert seen[-1].outputs == expected.outputs
        assert llm.engine.stats()["pages_used"] == 0

    run(body)


def test_a_thousand_requests_half_of_them_aborted_leave_nothing():
    rng = random.Random(7)

    async def one(llm, i, abort):
        stream = llm.generate(
            f"x{i} = ", Params(max_tokens=rng.choice((1, 2, 8)), temperature=0.9, seed=i), f"r{i}"
        )
        if abort == "before":
            task = asyncio.ensure_future(last(stream))
            await asyncio.sleep(0)
            await llm.abort(f"r{i}")
            return (await task).outputs[0].finish_reason
        if abort == "cancel":
            task = asyncio.ensure_future(last(stream))
            await asyncio.sleep(rng.random() * 0.3)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return "cancelled" if task.cancelled() else "ended"
        if abort == "leave":
            async for _ in stream:
                break
            await stream.aclose()
            return "left"
        return (await last(stream)).outputs[0].finish_reason

    async def body():
        tasks = asyncio.all_tasks()
        llm = make(AsyncLLM, max_num_seqs=64, kv_cache_memory=1 << 20)
        async with llm:
            fates = [None] * 500 + [rng.choice(["before", "cancel", "leave"]) for _ in range(500)]
            rng.shuffle(fates)
            ends = await asyncio.gather(*(one(llm, i, fate) for i, fate in enumerate(fates)))
            for fate, end in zip(fates, ends, strict=True):
                assert end in {None: ("stop", "length"), "before": ("abort", "stop", "length")}.get(
                    fate, ("cancelled", "ended", "left")
                )
            while llm.engine.has_work:
                await asyncio.sleep(0.01)
            stats = llm.engine.stats()
            assert (stats["running"], stats["waiting"], stats["pages_used"]) == (0, 0, 0)
            assert not llm._streams and len(llm._requests) == 0 and not llm._thread._keys
            assert not llm._thread._inbox and not llm._thread._outbox
            assert asyncio.all_tasks() == tasks
        gc.collect()

    run(body)


def test_abort_yields_what_was_drawn():
    async def body():
        async with make(AsyncLLM) as llm:
            seen = []
            async for output in llm.generate("def f", Params(max_tokens=200), "a"):
                seen.append(output)
                if len(seen) == 2:
                    assert await llm.abort("a")
            assert seen[-1].outputs[0].finish_reason == "abort"
            assert len(seen[-1].outputs[0].token_ids) >= len(seen[1].outputs[0].token_ids)
            assert not await llm.abort("a") and not await llm.abort("never")

    run(body)


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_leaving_aborts(how):
    async def body():
        llm = frontend(AsyncLLM, lambda *_: time.sleep(0.005) or 97)
        async with llm:
            stream = llm.generate("a", Params(max_tokens=None))
            if how == "close":
                await anext(stream)
                await stream.aclose()
            else:
                task = asyncio.ensure_future(last(stream))
                await asyncio.sleep(0.02)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            while not llm.engine.calls["abort"]:
                await asyncio.sleep(0)
            assert not llm.engine.requests and not llm._streams

    run(body)


def test_requests_that_are_refused():
    async def body():
        async with make(AsyncLLM) as llm:
            good = asyncio.ensure_future(last(llm.generate("def f", GREEDY, "same")))
            for prompt, params, id, message in [
                ([5] * 300, GREEDY, None, "300 tokens, but max_model_len"),
                ("", GREEDY, None, "at least one character"),
                ("a", Params(n=17), None, "n must be at most"),
                (["a", "b"], GREEDY, None, "prompt must be one prompt, got a list of 2"),
                ("a", GREEDY, "same", "request_id must not be that of a request in flight"),
            ]:
                with pytest.raises(ValueError, match=message):
                    await last(llm.generate(prompt, params, id))
            with pytest.raises(TypeError, match="sampling_params must be SamplingParams"):
                await last(llm.generate("a", {"n": 1}))
            assert (await good).finished and not llm._streams

    run(body)


def test_a_failed_request_raises_in_its_own_iterator():
    async def body():
        llm = frontend(AsyncLLM, "hello")
        cause = RuntimeError("boom")
        llm.engine.fail["1"] = cause
        async with llm:
            ends = await asyncio.gather(
                *(last(llm.generate("a", request_id=f"r{i}")) for i in range(3)),
                return_exceptions=True,
            )
        assert [type(e).__name__ for e in ends] == ["RequestOutput", "EngineError", "RequestOutput"]
        assert str(ends[1]) == "request r1 failed: boom" and ends[1].__cause__ is cause

    run(body)


def test_the_end_of_the_engine_ends_all_iterators():
    async def body():
        llm = frontend(AsyncLLM, lambda *_: time.sleep(0.005) or 97)
        cause = RuntimeError("fault")

        async def until_dead():
            async for output in llm.generate("a"):
                if output.outputs[0].token_ids:
                    llm.engine.dead = cause

        async with llm:
            ends = await asyncio.gather(*(until_dead() for _ in range(5)), return_exceptions=True)
            assert all(type(e) is EngineError and e.__cause__ is cause for e in ends)
            with pytest.raises(EngineError, match="a CUDA fault"):
                await last(llm.generate("a"))

    run(body)


def test_close_ends_open_iterators():
    async def body():
        llm = frontend(AsyncLLM, lambda *_: time.sleep(0.005) or 97)
        task = asyncio.ensure_future(last(llm.generate("a", Params(max_tokens=None))))
        while not llm.engine.calls["step"]:
            await asyncio.sleep(0)
        llm.close()
        llm.close()
        assert llm.engine.closed
        with pytest.raises(EngineError, match="closed"):
            await last(llm.generate("a"))
        with pytest.raises(EngineError, match="the engine was closed"):
            await task

    run(body)


def test_close_before_any_request():
    llm = frontend(AsyncLLM, "hello")
    llm.close()
    assert llm.engine.closed


def test_a_slow_consumer_skips_states_and_misses_no_text():
    async def body():
        async with frontend(AsyncLLM, "hello world") as llm:
            seen = []
            async for output in llm.generate("a"):
                seen.append(output.outputs[0].text)
                await asyncio.sleep(0.05)
        assert seen[-1] == "hello world" and len(seen) < 6

    run(body)


def test_one_loop_after_another():
    llm = frontend(AsyncLLM, "hello")

    async def body():
        return (await last(llm.generate("a"))).outputs[0].text

    assert [asyncio.run(body()) for _ in range(3)] == ["hello"] * 3
    llm.close()


def test_a_loop_that_ended_in_the_middle_leaves_nothing():
    llm = frontend(AsyncLLM, lambda *_: 97)

    async def abandon():
        stream = llm.generate("a", Params(max_tokens=None), "same")
        await anext(stream)

    asyncio.run(abandon())

    async def again():
        return await last(llm.generate("a", Params(max_tokens=3), "same"))

    assert asyncio.run(again()).outputs[0].text == "aaa"
    llm.close()
    assert not llm.engine.requests
