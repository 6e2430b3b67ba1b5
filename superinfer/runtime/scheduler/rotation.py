"""What a scheduler keeps of the second tier: how long a step may wait for copies, load or compute, and the counters."""

from __future__ import annotations

from superinfer.runtime.kv.cache import BlockTable, Prefix
from superinfer.runtime.kv.copies import Copies, LinkUse
from superinfer.runtime.kv.duplex import DuplexCache
from superinfer.runtime.scheduler.base import TierGauges
from superinfer.runtime.scheduler.plan import StepResult

# Both are for where the link has no profile; it has its own of the same meaning (kv/link_profile.py).
# Copies a step may wait for: 8 blocks of 2 MiB are 0.3 ms of PCIe 5, 3 % of a step of 10 ms. Who needs more sits out.
MAX_WAITS = 8
# And as they go one after another, all before them must be over too: so long a step may wait, 48 blocks of PCIe 5.
MAX_WAIT_S = 2e-3
# Copies out under way up to which blocks are mirrored: what a step of 512 prompt tokens makes, 1.3 ms of PCIe 5.
MIRROR_BLOCKS = 32
MIRROR_S = 5e-3  # and no more of them than take so long: whoever gets such a block next has to wait for it
FIRST_MIRRORS = 2  # of these, until one is over: on a link that moves nothing, no more blocks than these are stuck
PROBE = 100.0  # where one block takes longer than that: one of so many times its own time, to see whether it still does
# What a block counts as taking while copies fail, doubled up to the second with each result that tells of failures
# alone: longer than may be mirrored, so that one is tried every second, in the end every 20.
FAILING_S, LONGEST_FAILING_S = 2 * MIRROR_S, 0.2
BLOCK_S = 50e-6  # seconds a block takes, until one has: 2 MiB over PCIe 5
LATE = 2.0  # steps from the end of a copy to the plan that knows of it
REPORT_S = 0.1  # results tell of copies a step or two late; a copy out for longer says that the link is slow
SMOOTHING = 0.2  # weight of the newest observation


class LoadCost:
    """Seconds per block of the link and per token of prefill, learnt from results, to choose between the two.

    block_s: of a copy in: as the link was measured before, then as copies go. Where it was not measured, of copies out
    while none came in, and None before either.
    """

    def __init__(self, block_s: float | None = None) -> None:
        self.block_s = block_s
        self.token_s: float | None = None
        self.step_s = 0.0  # of a step
        self._has_loaded = block_s is not None
        self._in_s = self._out_s = 0.0

    def observe(self, plan_tokens: int, decodes: int, result: StepResult, blocks_in: int, blocks_out: int) -> None:
        """A step of `plan_tokens` tokens, `decodes` of them decodes, with so many copies in and out, is done."""
        if plan_tokens:
            self.step_s = _smooth(self.step_s or None, result.elapsed)
        if plan_tokens - decodes > decodes:  # mostly prefill: its time is that of the tokens
            self.token_s = _smooth(self.token_s, max(0.0, result.elapsed - result.link.stall_s) / plan_tokens)
        self._in_s += result.link.in_s  # a copy that takes longer than a step is paid for in several results
        self._out_s += result.link.out_s
        if blocks_in and self._in_s > 0:
            before = self.block_s if self._has_loaded else None
            self.block_s = _smooth(before, self._in_s / blocks_in)
            self._has_loaded = True
        elif blocks_out and self._out_s > 0 and not self._has_loaded:
            self.block_s = _smooth(self.block_s, self._out_s / blocks_out)
        if blocks_in:
            self._in_s = 0.0
        if blocks_out:
            self._out_s = 0.0

    def loads(self, blocks: int, tokens: int, queued: int) -> bool:
        """Whether to load `blocks` behind `queued` others rather than compute `tokens`. True while not known."""
        if self.block_s is None or self.token_s is None:
            return True
        return (blocks + queued) * self.block_s <= tokens * self.token_s


def _smooth(before: float | None, now: float) -> float:
    return now if before is None else before + SMOOTHING * (now - before)


class Rotation:
    """The second tier as a scheduler sees it. Decides nothing about whom to rotate: that is the policy's."""

    def __init__(self, kv: DuplexCache) -> None:
        """Budgets come from the cache's link profile, where it has one."""
        self.kv = kv
        link = kv.link
        self.cost = LoadCost(link.block_in_s if link is not None else None)
        self._out_s = link.block_out_s if link is not None else 0.0  # of a block, as the link was measured
        # A fast link allows more. A slow one is bounded by time, in `can_wait` and `copies_of_plan`, not by number.
        self.max_waits = max(MAX_WAITS, link.max_waits if link is not None else 0)
        self.mirror_blocks = max(MIRROR_BLOCKS, link.mirror_blocks if link is not None else 0)
        self._oldest, self._oldest_since, self._stuck_s = 0, 0.0, 0.0
        self._now = self._probed = 0.0
        self._failing_s = 0.0  # 0 unless no copy that the last results told of could be made
        self._link = LinkUse()
        self._sizes: dict[int, tuple[int, int]] = {}  # by step under way: tokens, decodes

    @property
    def block_s(self) -> float:
        """Seconds a block takes over the link: as measured, and no less than the oldest copy has been under way, nor
        than where copies fail. The slower way counts: a copy in waits for the copy out that makes its room."""
        return max(self.cost.block_s or BLOCK_S, self._out_s, self._stuck_s, self._failing_s)

    @property
    def backlog_s(self) -> float:
        """How long the copies in that are under way will take."""
        return self.kv.num_pending_in * self.block_s

    @property
    def background_blocks(self) -> int:
        """How many copies each way nobody needs yet may be under way: what they cost is that others wait for them."""
        most = FIRST_MIRRORS if self._is_unknown else int(MIRROR_S / self.block_s)
        return min(self.mirror_blocks, most)

    @property
    def _is_unknown(self) -> bool:
        """Whether no copy has told how long one takes, nor that it cannot be made."""
        return self.cost.block_s is None and not self._failing_s

    @property
    def is_quick(self) -> bool:
        """Whether a block moves out and back sooner than its tokens are computed again. True while not known."""
        token_s = self.cost.token_s
        return token_s is None or 2 * self.block_s <= self.kv.page_size * token_s

    @property
    def is_worth_mirroring(self) -> bool:
        """Whether a block comes back sooner than its tokens are computed again: else it hardly ever will. True while
        not known."""
        token_s = self.cost.token_s
        return token_s is None or self.block_s <= self.kv.page_size * token_s

    @property
    def stalled_s(self) -> float:
        """Seconds that steps have waited for copies since the start."""
        return self._link.stall_s

    def watch(self, now: float) -> None:
        """Note how long the same copy has been the oldest one under way. Before each plan."""
        self._now = now
        oldest = self.kv.oldest_pending
        if oldest != self._oldest or not self.kv.num_pending:
            self._oldest, self._oldest_since = oldest, now
        self._stuck_s = max(0.0, now - self._oldest_since - REPORT_S)

    def can_wait(self, awaits: list[int], others: set[int]) -> bool:
        """Whether a step may wait for these copies, beside `others`: they are few, and few are before them."""
        if len(others.union(awaits)) > self.max_waits:
            return False
        return (max(awaits) - self.kv.oldest_pending) * self.block_s <= MAX_WAIT_S

    def worth_loading(self, path: Prefix) -> Prefix:
        """The part of a matched path to share: all of it, or up to its first block that is quicker to compute, or that
        a link on which copies fail would have to bring."""
        absent, before = self.kv.absent(path)
        if not absent:
            return path
        tokens = (len(path) - before) * self.kv.page_size
        loads = not self._failing_s and self.cost.loads(absent, tokens, self.kv.num_pending_in)
        return path if loads else Prefix(path.node, before)

    def worth_parking(self, table: BlockTable, computed: int) -> bool:
        """Whether a sequence that must give its blocks up is back sooner by loading them than by computing its first
        `computed` tokens anew. True while not known."""
        if self.cost.token_s is None or self.cost.block_s is None:
            return True
        absent = self.kv.blocks_for(computed) - self.kv.num_shared(table)
        return (absent + self.kv.num_pending) * self.block_s <= absent * self.kv.page_size * self.cost.token_s

    def idle_s(self, table: BlockTable, computed: int) -> float:
        """Seconds for which places compute nothing if a table leaves now and comes back later: whoever gets its blocks
        waits for those that are copied out, then itself for those that come in, and each hears of it LATE steps late.
        """
        dirty = self.kv.blocks_for(computed) - self.kv.num_mirrored(table)
        back = self.kv.blocks_for(computed) - self.kv.num_shared(table)
        return (dirty + back + self.kv.num_pending) * self.block_s + LATE * self.cost.step_s

    def blocks_wanted(self, table: BlockTable | None, path: Prefix, total: int) -> int:
        """Of `num_available`, what a sequence of `total` blocks takes: all but those that others hold in HBM."""
        return total - self.kv.num_held(path if table is None else table.prefix)

    def is_lost(self, table: BlockTable) -> bool:
        """Whether a failed copy took something the table needs."""
        return self.kv.totals.failed > 0 and not self.kv.is_intact(table)

    def copies_of_plan(self, expected: bool = False) -> Copies:
        """All copies of the plan being made, with what is mirrored in the background: where copies are worth it, or
        turns are expected, which are brought back before they are needed, however long that takes."""
        most = self.background_blocks if expected or self.is_worth_mirroring else 0
        if most == 0 and not self.kv.num_pending and self._now >= self._probed + PROBE * self.block_s:
            self._probed, most = self._now, 1
        self.kv.mirror(most)
        return self.kv.take_copies()

    def planned(self, step: int, tokens: int, decodes: int) -> None:
        """Remember what a step's result will be judged by: tokens it computes, and how many of them are decodes."""
        self._sizes[step] = tokens, decodes

    def dropped(self, step: int) -> None:
        """The step failed: it has no result. Its copies are reported with a later one."""
        self._sizes.pop(step, None)

    def settle(self, result: StepResult) -> bool:
        """Take in a result's reports. True when running sequences may have lost something."""
        blocks_in, blocks_out = self.kv.totals.blocks_in, self.kv.totals.blocks_out
        hurt = self.kv.settle(result.copied, result.failed_copies)
        if result.copied:
            self._failing_s = 0.0
        elif result.failed_copies:
            self._failing_s = min(2 * self._failing_s or FAILING_S, LONGEST_FAILING_S)
            self._probed = self._now
        tokens, decodes = self._sizes.pop(result.step)
        moved_in, moved_out = self.kv.totals.blocks_in - blocks_in, self.kv.totals.blocks_out - blocks_out
        self.cost.observe(tokens, decodes, result, moved_in, moved_out)
        self._link = LinkUse(*(a + b for a, b in zip(self._link, result.link, strict=True)))
        return hurt

    def gauges(self) -> TierGauges:
        """For reports."""
        kv = self.kv
        return TierGauges(kv.num_dram, kv.num_dram_free, kv.num_dram_pinned, kv.num_pending, kv.totals, self._link)
