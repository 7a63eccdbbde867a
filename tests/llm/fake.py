"""An engine that draws what a script says, a step late as the real one, and a tokenizer of letters."""

import itertools
from collections import Counter

import torch

from tlk.errors import CapacityError, EngineError
from tlk.llm.inputs import Text
from tlk.llm.requests import Requests
from tlk.runtime.engine import Update
from tlk.runtime.params import SamplingParams
from tlk.runtime.request import Request, check_token_ids

END = 0


class FakeEngine:
    """Every step launches a token for each sequence and reports those of the step before.

    script(prompt, continuation, place) is the token. A sequence that `finish` ended still reports the
    token that was in flight, which the caller must drop.
    """

    vocab_size, max_model_len = 128, 64

    def __init__(self, script):
        self.script = script
        self.requests, self.flight, self.ended = {}, [], []
        self.calls, self.added, self.dead, self.closed = Counter(), [], None, False
        self.fail = {}  # request id: the exception that its next step meets

    @property
    def has_work(self):
        return bool(self.requests or self.flight or self.ended)

    def add(self, prompt, params, *, id, bad_words=(), salt=b""):
        self._check()
        prompt = check_token_ids("prompt", prompt, self.vocab_size)
        if len(prompt) >= self.max_model_len:
            raise CapacityError(f"{len(prompt)} tokens are more than {self.max_model_len}")
        room = self.max_model_len - len(prompt)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        ends = frozenset(params.stop_token_ids) | (set() if params.ignore_eos else {END})
        request = Request(id, prompt, params, limit, ends, bad_words=tuple(bad_words))
        assert id not in self.requests
        self.requests[id] = request
        self.added.append(request)
        return request

    def abort(self, id):
        self._check()
        self.calls["abort"] += 1
        request = self.requests.pop(id, None)
        if request is None:
            return False
        self._end(request, "abort")
        return True

    def finish(self, sequence, stop_reason=None):
        self._check()
        assert not sequence.finished
        self.calls["finish"] += 1
        sequence.finish_reason, sequence.stop_reason = "stop", stop_reason
        self._retire(sequence.request)

    def step(self):
        self._check()
        self.calls["step"] += 1
        updates, self.ended = self.ended, []
        landed, self.flight = self.flight, []
        for request in list(self.requests.values()):
            if error := self.fail.pop(request.id, None):
                request.error = error
                del self.requests[request.id]
                self._end(request, "error")
                continue
            for sequence in request.sequences:
                if not sequence.finished and sequence.drawn < request.limit:
                    token = self.script(request.prompt, sequence.index, sequence.drawn)
                    sequence.pending += 1
                    self.flight.append((sequence, token))
        for sequence, token in landed:
            params = sequence.request.params
            over = sequence.finished
            if over:
                sequence.pending -= 1
            else:
                sequence.append(token)
                self._retire(sequence.request)
            if sequence.finish_reason in (None, "stop", "length"):
                likely = {token: -0.5, (token + 1) % self.vocab_size: -1.5}
                chosen = dict(list(likely.items())[: 1 + (params.logprobs or 0)])
                updates.append(Update(sequence, [token], [chosen]))
        return updates

    def close(self):
        self.closed = True
        self.requests.clear()

    def _check(self):
        if self.dead is not None:
            raise EngineError("a CUDA fault") from self.dead

    def _end(self, request, reason):
        for sequence in request.sequences:
            if not sequence.finished:
                sequence.finish_reason = reason
                self.ended.append(Update(sequence, [], []))

    def _retire(self, request):
        if request.finished:
            self.requests.pop(request.id, None)


class Letters:
    """Token i is the character i; 0 is special and ends a text."""

    chat_template = None
    name_or_path = "letters"

    def __call__(self, text, verbose=True):
        return {"input_ids": [ord(c) for c in text]}

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]

    def decode(self, ids, skip_special_tokens=False, **kwargs):
        return "".join("<end>" if i == END else chr(i) for i in ids if i or not skip_special_tokens)

    def convert_ids_to_tokens(self, id):
        return chr(id)


def writes(text):
    """A script that writes `text` and ends, whatever the prompt."""
    return lambda prompt, index, place: ord(text[place]) if place < len(text) else END


def frontend(kind, script, text=None):
    """An LLM or AsyncLLM over a fake engine that follows the script, or writes a text."""
    llm = object.__new__(kind)
    llm.engine = FakeEngine(writes(script) if isinstance(script, str) else script)
    llm.default_params, llm.device = SamplingParams(), torch.device("cpu")
    llm._text = Text(Letters()) if text is None else text
    llm._requests, llm._numbers = Requests(llm.engine, llm._text), itertools.count()
    return llm
