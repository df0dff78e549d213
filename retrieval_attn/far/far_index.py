"""The index over the far keys of one memory: built in the background, kept up to date, replaced when it fails."""

import logging
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from retrieval_attn.config import RetrievalConfig
from retrieval_attn.far.index_build import BuiltIndex, build_far_index
from retrieval_attn.far.index_choice import IndexChoice
from retrieval_attn.index import BuildCancelled, Index
from retrieval_attn.kernels import TailSummary
from retrieval_attn.threads.jobs import Cancelled, Job

log = logging.getLogger("retrieval_attn")

# Keys that are appended together, in the background, while as many steps go by. Until then steps read them exactly.
BATCH = 64

Submit = Callable[..., Job]


class Far(NamedTuple):
    """The far tokens of this moment, as stored: keys (G, S, D), values (G, S, Dv), in CPU memory."""

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[1]

    def before(self, stop: int) -> "Far":
        """The tokens before the `stop`-th."""
        return Far(self.keys[:, :stop], self.values[:, :stop])

    def after(self, start: int) -> "Far":
        """The tokens from the `start`-th on."""
        return Far(self.keys[:, start:], self.values[:, start:])


class BuildInputs(NamedTuple):
    """What an index is built from, besides the far tokens: its kind, and what teaches it (see `build_far_index`)."""

    choice: IndexChoice
    queries: Tensor
    scale: float


def n_covered(n_far: int) -> int:
    """How many of the far keys a step searches; the others, 64 to 127 of the newest, it reads one and all.

    It depends on the length alone, not on when a thread was done: equal tokens are answered equally.

    >>> [n_covered(n) for n in (127, 128, 1000)]
    [0, 64, 896]
    """
    return max(0, n_far // BATCH - 1) * BATCH


class FarIndex:
    """Holds the index that steps search, and the summary of the keys that a search does not find.

    Steps search a snapshot of `n_covered` keys. The next batch is appended in the background as soon as it is far; it
    is in the snapshot when the batch after it is far, too. Without `submit` it is appended then and there.

    A build or an append that fails is reported in the log, and all keys are searched exactly instead. Not safe for two
    threads.
    """

    def __init__(self, config: RetrievalConfig) -> None:
        self.config = config
        self.submit: Submit | None = None
        self.reason = ""
        self.build_seconds = 0.0
        self.build_fraction = 0.0
        self.built_on = 0
        self._index: Index | None = None  # grows
        self._view: Index | None = None  # what it was when the last step began
        self._tail: TailSummary | None = None  # of the keys in the view
        self._building: Job | None = None
        self._appending: Job | None = None
        self._scale = 1.0

    @property
    def if_built(self) -> Index | None:
        """The index, if there is one already; never waits."""
        return self._index

    @property
    def building(self) -> Job | None:
        """The build that the next search will wait for, if there is one."""
        return self._building

    def for_step(self, far: Far, build_inputs: Callable[[], BuildInputs]) -> Index | None:
        """A snapshot over the first `n_covered` far keys: built, waited for, or brought up to date; None over none."""
        n = n_covered(far.length)
        if n == 0:
            return None
        self._bring_up_to_date(far.before(n), build_inputs)
        if self.submit is not None and self._appending is None:
            self._appending = self.submit(_append_next, self._index, far.before(n + BATCH).keys, n)
        return self._view

    def to_save(self, far: Far, build_inputs: Callable[[], BuildInputs]) -> Index | None:
        """As `for_step`, but the index itself, with nothing under way."""
        if n := n_covered(far.length):
            self._bring_up_to_date(far.before(n), build_inputs)
        self.truncate(far)
        return self._index

    def _bring_up_to_date(self, covered: Far, build_inputs: Callable[[], BuildInputs]) -> None:
        if self._building is not None:
            self._take_build(self._building, covered)
        if self._index is None:
            self._build(covered, build_inputs())
        self._follow(covered)

    def tail(self, far: Far) -> TailSummary:
        """The summary of exactly the keys that the last step searched; call `for_step` first."""
        assert self._view is not None
        if self._tail is None:
            self._tail = TailSummary(*far.before(self._view.n_keys))
        return self._tail

    def build_later(self, submit: Submit, far: Far, build_inputs: BuildInputs) -> None:
        """Hand the build to another thread, which adds `cancelled` if it likes; the first search waits for it."""
        self.build_fraction, self._scale = 0.0, build_inputs.scale
        covered = far.before(n_covered(far.length))
        self._building = submit(
            build_far_index,
            self.config,
            build_inputs.choice,
            *covered,
            build_inputs.queries,
            build_inputs.scale,
            progress=self._note_progress,
        )

    def forget_build(self) -> None:
        """Give up a build that has not finished; the next search starts anew."""
        if self._building is not None and not (self._building.done() and self._building.exception() is None):
            self._building.cancel()
            self._building = None

    def truncate(self, far: Far) -> None:
        """Keep only what covers the given far tokens, which are the first of those before."""
        covered = far.before(n_covered(far.length))
        self.settle(covered)
        tail, self._tail = self._tail, None
        if self._index is not None and 2 * covered.length < self._index.n_keys:
            # Cut by more than half, an index no longer suits its keys: the next search builds a new one.
            self._index, self._view = None, None
        if self._index is None:
            return
        if covered.length < self._index.n_keys:
            self._index.truncate(covered.length)
        self._view = self._index.snapshot()
        if tail is not None:
            tail.truncate(covered.length, *covered)
            self._tail = tail

    def settle(self, far: Far) -> None:
        """Wait for a build and an append that are under way, and take what they made."""
        if self._building is not None:
            self._take_build(self._building, far)
        self._take_append(far)

    def drop(self) -> None:
        """Forget everything: the stored keys are others."""
        if self._building is not None:
            self._building.cancel()
        self._index = self._view = self._tail = self._building = self._appending = None

    def adopt(self, index: Index, tail: TailSummary | None, reason: str, built_on: int | None = None) -> None:
        """Use an index over the first far keys, and the summary of the same keys if it is at hand.

        built_on: how many keys it was built on, where it has grown since; None if it has not.
        """
        # The view first: a step that finds an index finds one to search, too, wherever this is interrupted.
        self._tail, self._view, self._index = tail, index.snapshot(), index
        self.built_on, self.reason = index.n_keys if built_on is None else built_on, reason
        if index.lift is not None:
            self._scale = index.lift.scale

    def fork(self, far: Far, own: Far) -> "FarIndex":
        """The same index for a memory whose far tokens are equal, in its `own` memory. Waits for what is under way."""
        twin = FarIndex(self.config)
        twin.submit = self.submit
        self.truncate(far)
        if self._index is not None:
            index, tail = self._index.fork(own.before(self._index.n_keys).keys), self._tail
            twin.adopt(index, tail and TailSummary.restore(tail.state()), self.reason, self.built_on)
            twin._scale = self._scale
        return twin

    def _build(self, far: Far, build_inputs: BuildInputs) -> None:
        choice, queries, self._scale = build_inputs
        try:
            self._adopt(build_far_index(self.config, choice, *far, queries, self._scale))
        except Exception as error:
            self._search_exactly(far, f"the {choice.kind} index cannot be built", error)

    def _follow(self, far: Far) -> None:
        """Let steps search exactly these keys."""
        assert self._view is not None
        assert self._index is not None
        if self._view.n_keys == far.length:
            return
        self._take_append(far)
        if self._index.n_keys < far.length:
            try:
                self._index.append(far.after(self._index.n_keys).keys, keys=far.keys)
            except Exception as error:
                self._search_exactly(far, f"the {self._index.kind} index cannot take new keys", error)
                return
        tail, self._tail = self._tail, None
        self._view = self._index.snapshot()
        # Interrupted half-way, a summary is of no use: it is then made anew.
        if tail is not None:
            tail.append(*far.after(tail.length))
            self._tail = tail

    def _take_append(self, far: Far) -> None:
        """Wait for an append under way."""
        if self._appending is None:
            return
        try:
            self._appending.result()
        except Exception as error:
            self._appending = None
            assert self._index is not None
            self._search_exactly(far, f"the {self._index.kind} index cannot take new keys", error)
        self._appending = None

    def _take_build(self, building: Job, far: Far) -> None:
        try:
            built = building.result()
        except (BuildCancelled, Cancelled):
            self._building = None
            return
        except Exception as error:
            # An interrupted wait does not come here: it must not lose the build.
            self._building = None
            self._search_exactly(far, f"the {self.config.index} index cannot be built", error)
            return
        self._adopt(built)
        self._building = None

    def _adopt(self, built: BuiltIndex) -> None:
        self.adopt(built.index, built.tail, built.reason)
        self.build_seconds = built.seconds

    def _search_exactly(self, far: Far, what: str, error: Exception) -> None:
        cause = f"{what} ({error or type(error).__name__})"
        log.warning("%s; all keys are searched exactly until the next request, which tries again", cause)
        if far.length == 0:
            self._index = self._view = self._tail = None
            return
        exact = IndexChoice("exact", cause)
        self._adopt(build_far_index(self.config, exact, *far, None, self._scale))

    def _note_progress(self, fraction: float) -> None:
        self.build_fraction = fraction


def _append_next(index: Index, keys: Tensor, n: int) -> None:
    """Append what follows the first n of these keys, unless that was done, by a call whose job was lost to Ctrl-C."""
    if index.n_keys == n:
        index.append(keys[:, n:], keys=keys)
