"""Which tokens of which requests the next step computes, and on which pages of the cache.

The scheduler runs one step ahead of what the host knows: while it decides on step N + 1, the tokens
drawn in step N are still on the device (`Sequence.pending`). It may be told after the fact that a
sequence has ended; what was launched for it by then is wasted and harms nobody, because whatever
reuses its pages is launched later, on the same stream.

Order of service is order of arrival, and nobody overtakes: running sequences first, then those that
ran before (they gave up their pages, or wait to start from the prompt of their request's first
sequence), then new requests. When a running sequence needs a page and none is left, the youngest
sequence that holds pages gives up all of its own and is recomputed later; the oldest always goes on.

`schedule` takes 0.25 ms of CPU time for 256 sequences that decode (one core of an AMD EPYC, Python 3.11), whatever
the number of waiting requests: bench/bench_scheduler.py.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence as Many
from heapq import heappop, heappush
from itertools import count as counter

from tlk.errors import CapacityError
from tlk.runtime.pages import PageGroup, block_key, longest_prefix, root_key
from tlk.runtime.request import Chunk, FinishReason, Request, Sequence, Step


class Scheduler:
    """In-flight batching over paged caches with shared prefixes.

    num_pages and windows: for each cache group, the pages of its pool and how many positions a query
    sees (0: all). page_size: tokens of a page. max_num_seqs: sequences that run at once; each has a
    state row 0 ≤ row < max_num_seqs. max_num_batched_tokens: tokens of a step. max_model_len: tokens
    of prompt and output together. salt: what the keys and values of every request depend on (the
    model, the cache's dtype and scales); part of every prefix's key.

    After each `schedule` its step must be launched, or handed to `fail`, before any other call.
    """

    def __init__(
        self,
        num_pages: Many[int],
        windows: Many[int],
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        *,
        enable_prefix_caching: bool = True,
        salt: bytes = b"",
    ) -> None:
        if len(num_pages) != len(windows) or not windows:
            raise ValueError(
                f"num_pages and windows must have one entry per cache group, got {list(num_pages)} "
                f"and {list(windows)}"
            )
        if (least := min(max_num_seqs, max_num_batched_tokens, max_model_len)) < 1:
            raise ValueError(
                f"max_num_seqs, max_num_batched_tokens and max_model_len must be positive, got {least}"
            )
        self.groups = [PageGroup(p, w, page_size) for p, w in zip(num_pages, windows, strict=True)]
        self.page_size, self.max_model_len = page_size, max_model_len
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.enable_prefix_caching, self.salt = enable_prefix_caching, salt
        # A chunk may be no longer than what a pool holds beside its window.
        chunks = [group.longest_chunk for group in self.groups if group.window]
        self.max_chunk = min([max_num_batched_tokens, *(c for c in chunks if c > 0)])
        self.preemptions = 0
        self.cached_tokens = 0  # prompt tokens found in the prefix cache by new requests
        self._requests: dict[str, Request] = {}
        self._new: OrderedDict[str, Sequence] = OrderedDict()  # never ran, by order of arrival
        self._unforked: dict[str, list[Sequence]] = {}  # wait for their prompt to be computed
        self._forked: list[Sequence] = []  # whose prompt the step being scheduled completes
        self._returning: list[Sequence] = []  # preempted or forked, by order of arrival
        self._running: list[Sequence] = []  # hold a row, by order of arrival
        self._rows = list(range(max_num_seqs))  # a heap: the lowest is taken first
        self._arrivals = counter()

    def add(self, request: Request) -> None:
        """Queue a request. ValueError or CapacityError if it can never be served."""
        self._check(request)
        request.arrival = next(self._arrivals)
        self._requests[request.id] = request
        first, *others = request.sequences
        self._new[request.id] = first
        if others:
            self._unforked[request.id] = others

    def abort(self, request_id: str) -> list[Sequence]:
        """End a request wherever it is, and free all it holds; its sequences that this ended."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        ended = self._end(request, "abort")
        for sequence in ended:
            self._leave(sequence)
        return ended

    def fail(self, step: Step) -> list[Request]:
        """End the requests of a step that could not be launched; what it would have computed is lost."""
        failed = list(dict.fromkeys(chunk.sequence.request for chunk in step.chunks))
        for request in failed:
            for sequence in self._end(request, "error"):
                sequence.computed = 0  # nothing more of it is published
                self._leave(sequence)
        return failed

    def finish(self, sequence: Sequence) -> None:
        """Free all that a finished sequence holds. Its full pages stay findable as a prefix."""
        if not sequence.finished:
            raise ValueError(f"sequence {sequence.index} of {sequence.request.id} has not finished")
        self._leave(sequence)
        request = sequence.request
        if request.finished and self._requests.get(request.id) is request:
            del self._requests[request.id]

    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    @property
    def running(self) -> int:
        """Sequences that hold a state row."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that hold none."""
        siblings = sum(len(sequences) for sequences in self._unforked.values())
        return len(self._new) + len(self._returning) + siblings

    @property
    def pages_used(self) -> list[int]:
        """Pages with an owner, of each cache group."""
        return [group.pool.num_pages - group.pool.available for group in self.groups]

    def schedule(self) -> Step | None:
        """The next step. Its effects on sequences and pages hold from here on.

        None: there is no work, or all of it waits for tokens that are still on the device.
        """
        step = Step([], [], [])
        preemptions = self.preemptions
        budget = self._continue_running(step)
        if not self._running or preemptions == self.preemptions:
            self._admit(step, budget)
        for sequence in self._forked:
            insort(self._returning, sequence, key=_place)
        self._forked.clear()
        return step if step.chunks else None

    def _continue_running(self, step: Step) -> int:
        """Schedule running sequences in order of arrival; the tokens left of the budget."""
        budget, max_chunk = self.max_num_batched_tokens, self.max_chunk
        for sequence in self._running:  # sequences are preempted from its end only
            request = sequence.request
            drawn = len(sequence.output) + sequence.pending
            if drawn >= request.limit:
                continue  # its last token is on the device
            start = sequence.computed
            length = len(request.prompt) + drawn
            stop = min(length, start + min(budget, max_chunk)) if length - start > 1 else length
            if stop > sequence.room:
                if not self._make_room(sequence, stop):
                    break  # it was the youngest itself
                self._assign(sequence, stop, step)
            self._compute(sequence, stop, length, step)
            budget -= stop - start
            if not budget:
                break
        return budget

    def _admit(self, step: Step, budget: int) -> None:
        """Start waiting sequences in order of arrival, while there are tokens, rows and pages."""
        while budget and len(self._rows) > len(self._forked):  # which are served before others
            sequence = self._next_waiting()
            if sequence is None or sequence.pending:
                return
            blocks = self._cached_blocks(sequence)
            if not self._fits(sequence, blocks):
                if self._running:
                    return
                self._preempt(self._youngest())  # siblings that wait hold pages of their prompt
                continue
            self._start(sequence, blocks)
            length = sequence.length
            stop = min(length, sequence.computed + min(budget, self.max_chunk))
            budget -= stop - sequence.computed
            self._assign(sequence, stop, step, whole_table=True)
            self._compute(sequence, stop, length, step)

    def _compute(self, sequence: Sequence, stop: int, length: int, step: Step) -> None:
        """Put a sequence's tokens up to `stop`, of `length`, into the step."""
        start = sequence.computed
        sequence.computed = stop
        step.chunks.append(Chunk(sequence, start, stop - start, stop == length))
        if stop == length:
            sequence.pending += 1
            if start < len(sequence.request.prompt):
                self._fork(sequence)

    def _fork(self, first: Sequence) -> None:
        """Share the prompt's pages with the request's other sequences, once they are computed.

        Each computes the prompt's last token again, for logits of its own to draw from.
        """
        for sequence in self._unforked.pop(first.request.id, ()):
            sequence.computed = len(first.request.prompt) - 1
            sequence.published = sequence.computed // self.page_size  # or will be, by the first
            sequence.keys = first.keys.copy()
            sequence.pages = [
                group.share(table, sequence.computed)
                for group, table in zip(self.groups, first.pages, strict=True)
            ]
            first.room = first.computed  # so that its next token finds the page shared
            self._forked.append(sequence)

    # Pages

    def _make_room(self, sequence: Sequence, stop: int) -> bool:
        """Have the pages available that `sequence` needs up to `stop`, at the cost of the youngest.

        False if it was the youngest itself, and now waits.
        """
        self._tidy(sequence)
        while any(
            group.missing(table, sequence.computed, stop) > group.pool.available
            for group, table in zip(self.groups, sequence.pages, strict=True)
        ):
            youngest = self._youngest()
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _assign(
        self, sequence: Sequence, stop: int, step: Step, *, whole_table: bool = False
    ) -> None:
        """Give a sequence the pages it needs up to `stop`, and tell the runner."""
        for g, (group, table) in enumerate(zip(self.groups, sequence.pages, strict=True)):
            first, source = group.extend(table, sequence.computed, stop)
            if source is not None:
                step.copies.append((g, source, table[first]))
            for index in range(0 if whole_table else first, len(table)):
                if table[index] >= 0:
                    step.new_pages.append((g, sequence.row, index, table[index]))
        full_blocks = stop // self.page_size
        if self.enable_prefix_caching and full_blocks > sequence.published:
            sequence.room = stop  # come here again at the next token, and publish them
        else:
            sequence.room = -(-stop // self.page_size) * self.page_size

    def _tidy(self, sequence: Sequence) -> None:
        """Publish what the launched steps computed, then release what no later query sees."""
        if self.enable_prefix_caching:
            known = len(sequence.request.prompt) + len(sequence.output)
            full_blocks = min(sequence.computed, known) // self.page_size
            if full_blocks > sequence.published:
                self._extend_keys(sequence)
                for group, table in zip(self.groups, sequence.pages, strict=True):
                    for index in range(sequence.published, full_blocks):
                        if table[index] >= 0:
                            group.pool.publish(table[index], sequence.keys[index])
                sequence.published = full_blocks
        for group, table in zip(self.groups, sequence.pages, strict=True):
            group.drop_unseen(table, sequence.computed)

    def _extend_keys(self, sequence: Sequence) -> None:
        """Let `sequence.keys` have the key of every full block of known tokens."""
        keys, size = sequence.keys, self.page_size
        known = len(sequence.request.prompt) + len(sequence.output)
        for block in range(len(keys), known // size):
            previous = keys[-1] if keys else root_key(self.salt, sequence.request.salt)
            keys.append(block_key(previous, sequence.tokens(block * size, (block + 1) * size)))

    def _cached_blocks(self, sequence: Sequence) -> int:
        """Full blocks that a sequence without pages finds in the prefix cache."""
        wants_all_logits = sequence.request.params.prompt_logprobs is not None
        if not self.enable_prefix_caching or wants_all_logits or any(sequence.pages):
            return 0
        self._extend_keys(sequence)
        # Its last token must be computed, to have logits.
        most = (sequence.length - 1) // self.page_size
        return longest_prefix(self.groups, sequence.keys[:most])

    def _fits(self, sequence: Sequence, blocks: int) -> bool:
        """Whether there are pages for all tokens of a waiting sequence that finds `blocks` cached.

        And one for each that runs: whoever is admitted into the last pages will soon be preempted.
        """
        for group, table in zip(self.groups, sequence.pages, strict=True):
            held = sum(page >= 0 for page in table)
            cached = group.cached(sequence.keys[:blocks])
            idle = sum(group.pool.owners[page] == 0 for page in cached)
            needed = group.pages_for(sequence.length, self.max_chunk) - held - len(cached) + idle
            needed += group.shares_next(table, sequence.computed)
            if needed + len(self._running) > group.pool.available:
                return False
        return True

    # Places

    def _next_waiting(self) -> Sequence | None:
        if self._returning:
            return self._returning[0]
        return next(iter(self._new.values()), None)

    def _start(self, sequence: Sequence, blocks: int) -> None:
        """Move a waiting sequence to the running ones, with `blocks` cached blocks and a row."""
        if blocks:
            for group, table in zip(self.groups, sequence.pages, strict=True):
                group.share_cached(table, sequence.keys[:blocks])
            sequence.computed = blocks * self.page_size
            sequence.published = blocks
        if self._returning:
            self._returning.pop(0)
        else:
            del self._new[sequence.request.id]
            sequence.request.cached_tokens = sequence.computed
            self.cached_tokens += sequence.computed
        sequence.row = heappop(self._rows)
        insort(self._running, sequence, key=_place)

    def _youngest(self) -> Sequence:
        """The sequence that came last, of those that hold pages."""
        waiting = next((s for s in reversed(self._returning) if any(s.pages)), None)
        holders = [*self._running[-1:], *([waiting] if waiting else [])]
        return max(holders, key=_place)

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's pages and row; it will be computed again."""
        self._leave(sequence)
        self.preemptions += 1
        sequence.computed = sequence.published = sequence.room = 0
        insort(self._returning, sequence, key=_place)

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out of its queue, and its pages and row from it."""
        self._tidy(sequence)
        for group, table in zip(self.groups, sequence.pages, strict=True):
            group.release(table)
        if sequence.row >= 0:
            heappush(self._rows, sequence.row)
            sequence.row = -1
            _remove(self._running, sequence)
        else:
            _remove(self._returning, sequence)

    def _end(self, request: Request, reason: FinishReason) -> list[Sequence]:
        """Forget a request; its sequences that had not finished."""
        del self._requests[request.id]
        self._new.pop(request.id, None)
        self._unforked.pop(request.id, None)
        unfinished = [s for s in request.sequences if not s.finished]
        for sequence in unfinished:
            sequence.finish_reason = reason
        return unfinished

    def _check(self, request: Request) -> None:
        if request.id in self._requests:
            raise ValueError(f"request id {request.id!r} is taken by an unfinished request")
        if request.groups != len(self.groups):
            raise ValueError(f"groups must be {len(self.groups)}, got {request.groups}")
        if request.params.n > self.max_num_seqs:
            raise ValueError(
                f"n must be at most max_num_seqs ({self.max_num_seqs}), got {request.params.n}"
            )
        length = len(request.prompt)
        if length >= self.max_model_len:
            raise ValueError(
                f"prompt has {length} tokens and the context {self.max_model_len}: "
                "it must leave room for at least one more"
            )
        if not 1 <= request.limit <= self.max_model_len - length:
            raise ValueError(
                f"limit must be at least 1 and at most {self.max_model_len - length}, what a prompt "
                f"of {length} tokens leaves of the context of {self.max_model_len}, got {request.limit}"
            )
        total = length + request.limit - 1
        for g, group in enumerate(self.groups):
            pages = group.pages_for(total, self.max_chunk)
            if pages > group.pool.num_pages:
                raise CapacityError(
                    f"a prompt of {length} tokens and {request.limit} new ones, the last of which is "
                    f"not cached, are {total} tokens: {pages} pages of {self.page_size}, and cache "
                    f"group {g} has {group.pool.num_pages}"
                )


def _place(sequence: Sequence) -> tuple[int, int]:
    """A sequence's place in the order of service."""
    return sequence.request.arrival, sequence.index


def _remove(ordered: list[Sequence], sequence: Sequence) -> None:
    """Remove `sequence` from a list by order of arrival, if it is there."""
    index = bisect_left(ordered, _place(sequence), key=_place)
    if index < len(ordered) and ordered[index] is sequence:
        del ordered[index]
