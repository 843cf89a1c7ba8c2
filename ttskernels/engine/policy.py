"""Decoding branches: one mixed iteration (prefill, recompute, first tokens) or many pure decode iterations in one call."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ttskernels.engine.ahead import Ahead, Decoding
from ttskernels.engine.keys import as_int64, child_key
from ttskernels.engine.residency import Residency, missing, uncached_rows
from ttskernels.engine.work import Branch, Session, StepEnd
from ttskernels.errors import BadLogitsError, OutOfPagesError
from ttskernels.kv.forest import Forest, Node
from ttskernels.kv.plan import build_plan
from ttskernels.kv.plan_layout import RUN_TOKENS

SLACK_TOKENS = 8  # a leaf with fewer free slots is topped up, so that a plan lasts at least this many iterations
MAX_ITERATIONS = 16  # tokens a decode call may run before new work is looked at
SHORT_ITERATIONS = 4  # the same in a batch so small that scores may soon let more branches join it
PREFILL_ROWS = 2048  # rows of one forward; a longer prompt is prefilled in several


class PolicyRunner:
    """Holds the policy, its forest and pool, and the branches that are under way."""

    def __init__(
        self, model, forest: Forest, residency: Residency, next_state: torch.Tensor | None, ahead_rows: int = 0
    ):
        if next_state is None:
            raise ValueError("next_state is None; a policy needs the stop automaton of its tokenizer")
        if next_state.dtype != torch.int32 or next_state.ndim != 2 or next_state.shape[1] != model.config.vocab:
            raise ValueError(
                f"next_state must be int32 [states, vocab {model.config.vocab}], got {next_state.dtype} "
                f"{tuple(next_state.shape)}; compile it with the policy's own tokenizer"
            )
        self.model, self.forest, self.residency, self.next_state = model, forest, residency, next_state.contiguous()
        self.heads = model.config.heads
        self.branches: list[Branch] = []  # asked for
        self.ahead, self.ahead_rows = Ahead(forest), ahead_rows  # not asked for; see Engine
        self._crowded = False  # a branch that was asked for found no room in the last batch
        self._running: list[Branch] = []  # resident, with exactly one uncached token each
        self._plan = None  # of self._running, while nothing changed
        self._plan_epoch = -1

    def busy_before(self, order: int) -> set[Node]:
        """Nodes that the resident branches of problems older than `order` read."""
        return {n for b in self.branches if b.session.order < order and b.node.cached for n in self.forest.path(b.node)}

    def children(
        self,
        session: Session,
        parent: Node,
        key: int,
        path_key: tuple[int, ...],
        ordinals: list[int],
        decoding: Decoding,
        max_steps: int,
    ) -> list[Branch]:
        """The children of a node that somebody asks for: those begun ahead, and new ones. They still have to be added."""
        self.ahead.claim(parent)
        begun = {o: self.ahead.take(parent, o, decoding) for o in ordinals} if max_steps == 1 else {}
        missing = [o for o in ordinals if begun.get(o) is None]
        for ordinal, node in zip(missing, self.forest.fork(parent, len(missing)), strict=True):
            session.policy_nodes.add(node)
            begun[ordinal] = Branch(
                session, node, child_key(key, ordinal), (*path_key, ordinal), decoding.sampling, decoding.max_step_tokens,
                decoding.max_length, max_steps,
            )  # fmt: skip
        session.counters.policy_reused += len(ordinals) * self.forest.length(parent)  # less what is prefilled for them
        return [begun[o] for o in ordinals]

    def add(self, branch: Branch) -> None:
        self.branches.append(branch)
        self._plan = None

    def wish(self, *wish) -> None:
        """See `Ahead.wish`."""
        if self.ahead_rows:
            self.ahead.wish(*wish)
            self._plan = None

    def drop(self, unwanted: Callable[[Branch], bool]) -> None:
        """Forget branches and give back their leaves."""
        for branch in [b for b in self.branches if unwanted(b)]:
            self.branches.remove(branch)
            self.forest.release(branch.node)
        self.ahead.drop(unwanted)
        self._plan = None

    def abort(self, error: BaseException) -> None:
        """End every branch with `error`."""
        self.ahead.drop(lambda branch: True)
        for branch in list(self.branches):
            self._fail(branch, error)

    def step(self) -> bool:
        """Run the waiting branches for one mixed iteration, or, if none waits, all for several. False: nothing to do."""
        if not self.branches:
            return False
        if self._plan is not None and self._plan_has_room() and self._plan.advance():
            return self._decode()
        admitted = self._admit()
        if not admitted:
            first = min(self.branches, key=lambda b: b.priority)
            self._fail(first, OutOfPagesError("one branch alone does not fit into the KV budget; raise kv_bytes"))
            return True
        if all(b.whole and b.node.cached == len(b.node.ids) - 1 for b in admitted):
            self._running, self._plan_epoch = admitted, self.residency.epoch
            rows = [(b.node, len(b.node.ids) - 1, 1) for b in admitted]
            self._plan = build_plan(self.forest, rows, self.heads, machine=self.model.machine)
            return self._decode()
        return self._mixed(admitted)

    # -- admission ---------------------------------------------------------------------------------------------------

    def _plan_has_room(self) -> bool:
        whole = self._plan_epoch == self.residency.epoch  # scoring evicts too
        return whole and not self._crowded and all(self._room(b) > 0 for b in self._running)

    def _admit(self) -> list[Branch]:
        """Branches whose whole path is (or now became) resident, oldest problem first, with a slot for the next token."""
        self._plan = None
        order = sorted(self.branches, key=lambda b: b.priority)
        if self._reserve_all(order):
            admitted = order
        else:
            admitted, pinned = [], set()
            for branch in order:
                path = self.forest.path(branch.node)
                needs = self._needs(branch)
                if not needs or self.residency.reserve(self.forest, needs, pinned.union(path), branch.session):
                    pinned.update(path)
                    admitted.append(branch)
            # A later branch's reserve may evict only what is not pinned, so every admitted path is still whole.
        self._crowded = len(admitted) < len(self.branches)
        if admitted and not self._crowded:
            admitted = [*admitted, *self._fill(self.ahead_rows - len(admitted))]
        for branch in admitted:
            branch.resident_epoch = self.residency.epoch
        return admitted

    def _reserve_all(self, branches: list[Branch]) -> bool:
        """Slots for every branch without evicting anything, if there are so many. Where kernels want pages that follow each
        other, leaves grow by a run of them, while that fits."""
        for tokens in (RUN_TOKENS, SLACK_TOKENS) if self.forest.pool.keeps_runs else (SLACK_TOKENS,):
            needs: dict[Node, int] = {}
            for branch in branches:
                needs.update(self._needs(branch, tokens))
            if not needs or self._try(list(needs.items())):
                return True
        return False

    def _fill(self, room: int) -> list[Branch]:
        """Branches that nobody has asked for yet, if they take no page from anybody: all that are sure to be, and others if
        there is `room` in the batch."""
        filled: list[Branch] = []
        for sure in (True, False):
            candidates = self.ahead.candidates(sure)
            while (sure or len(filled) < room) and (branch := next(candidates, None)) is not None:
                needs = self._needs(branch)
                if needs and not self._try(list(needs.items())):
                    return filled
                filled.append(branch)
        return filled

    def _needs(self, branch: Branch, tokens: int = SLACK_TOKENS) -> dict[Node, int]:
        """Nodes of a branch's path without slots for their ids, and its leaf, with `tokens` more, if that is nearly full."""
        node = branch.node
        needs = {}
        if branch.resident_epoch != self.residency.epoch:  # something was evicted since, or the branch is new
            path = self.forest.path(node)
            needs = missing(path)
            branch.whole = bool(node.ids) and all(n.cached == len(n.ids) for n in path[:-1])
        room = branch.max_length - node.pos0 - len(node.ids)
        if node.capacity - len(node.ids) < min(SLACK_TOKENS, room):
            needs[node] = min(tokens, room)
        return needs

    def _try(self, needs: list[tuple[Node, int]]) -> bool:
        try:
            self.forest.reserve([n for n, _ in needs], [t for _, t in needs])
            return True
        except OutOfPagesError:
            return False

    # -- running -----------------------------------------------------------------------------------------------------

    def _mixed(self, branches: list[Branch]) -> bool:
        """One forward over everything uncached on the branches' paths, then one sampled token each."""
        started = time.perf_counter()
        rows, last_row = uncached_rows(self.forest, [b.source for b in branches], PREFILL_ROWS)
        ready = [b for b in branches if b.source in last_row]
        sources = {s: i for i, s in enumerate(dict.fromkeys(b.source for b in ready))}
        ids = torch.tensor([t for node, first, n in rows for t in node.ids[first : first + n]], dtype=torch.int32)
        out_rows = torch.tensor([last_row[s] for s in sources], dtype=torch.int32)
        plan = build_plan(self.forest, rows, self.heads, machine=self.model.machine)
        logits = self.model.forward(ids, plan, self.forest.pool, out_rows, output="logits")
        decoding = {b.node for b in branches if b.node.ids}
        total = sum(n for _, _, n in rows)
        seconds = time.perf_counter() - started
        for node, first, n in rows:
            counters = node.owner.counters
            counters.policy_flops += self.model.flops(node.pos0 + first, n, "kv")
            if node in decoding and n == 1:
                counters.decode_seconds += seconds / total
            else:
                new = max(0, first + n - max(node.seen, first))
                counters.policy_prefilled += new
                counters.policy_reused -= new
                counters.policy_recomputed += n - new
                counters.prefill_seconds += seconds * n / total
            node.cached = max(node.cached, first + n)
            node.seen = max(node.seen, node.cached)
        for source in sources:  # the last layer and the head run for these alone
            read = source.pos0 + len(source.ids) - 1
            source.owner.counters.policy_flops += self.model.flops(read) - self.model.flops(read, 1, "kv")
        if ready:
            self._sample(ready, logits, torch.tensor([sources[b.source] for b in ready], dtype=torch.int32))
        return True

    def _sample(self, branches: list[Branch], logits: torch.Tensor, rows: torch.Tensor) -> None:
        """One token for each branch from row `rows[i]` of the logits."""
        positions = torch.tensor([b.node.pos0 + len(b.node.ids) for b in branches], dtype=torch.int32)
        try:
            tokens, logprobs = self.model.sample(logits, rows, self._keys(branches), positions, self._params(branches))
        except BadLogitsError as error:
            bad = rows == error.row
            for branch in [b for b, its in zip(branches, bad.tolist(), strict=True) if its]:
                self._fail(branch, error)
            kept = [b for b, its in zip(branches, bad.tolist(), strict=True) if not its]
            return self._sample(kept, logits, rows[~bad]) if kept else None
        for branch, token, logprob in zip(branches, tokens.tolist(), logprobs.tolist(), strict=True):
            branch.whole = True
            state = int(self.next_state[branch.state, token])
            self._extend(branch, [token], [logprob], state)

    def _decode(self) -> bool:
        """Up to MAX_ITERATIONS tokens for every running branch in one call; stops when one ends its step."""
        started = time.perf_counter()
        branches = self._running
        most = MAX_ITERATIONS if len(branches) >= self.ahead_rows else SHORT_ITERATIONS
        iterations = min(most, *(self._room(b) for b in branches))
        tokens = torch.empty(iterations, len(branches), dtype=torch.int32)
        logprobs = torch.empty(iterations, len(branches), dtype=torch.float32)
        ids = torch.tensor([b.node.ids[-1] for b in branches], dtype=torch.int32)
        states = torch.tensor([b.state for b in branches], dtype=torch.int32)
        try:
            done = self.model.decode(
                ids, self._plan, self.forest.pool, self._keys(branches), self._params(branches), self.next_state, states,
                tokens, logprobs,
            )  # fmt: skip
        except BadLogitsError as error:  # what the others got is computed again, to the same tokens
            self._fail(branches[error.row], error)
            return True
        columns = tokens[:done].T.tolist()
        chances = logprobs[:done].T.tolist()
        seconds = (time.perf_counter() - started) / len(branches)
        for branch, column, chance, state in zip(branches, columns, chances, states.tolist(), strict=True):
            node, counters = branch.node, branch.session.counters
            taken = column.index(-1) if column[-1] < 0 else done  # on a GPU a row that has ended waits for others
            counters.decode_seconds += seconds
            counters.policy_flops += self.model.flops(node.pos0 + len(node.ids) - 1, taken)
            node.cached += taken
            node.seen = node.cached
            self._extend(branch, column[:taken], chance[:taken], state)
        return True

    def _room(self, branch: Branch) -> int:
        """Tokens this branch may still take before its step, its path or its reserved slots are full."""
        taken, node = len(branch.node.ids), branch.node
        return min(branch.max_step_tokens, branch.max_length - node.pos0, node.capacity) - taken

    def _keys(self, branches: list[Branch]) -> torch.Tensor:
        return torch.tensor([as_int64(b.key) for b in branches], dtype=torch.int64)

    def _params(self, branches: list[Branch]) -> torch.Tensor:
        rows = [(b.sampling.temperature, b.sampling.top_k, b.sampling.top_p, b.sampling.min_p) for b in branches]
        return torch.tensor(rows, dtype=torch.float32)

    def _extend(self, branch: Branch, tokens: list[int], logprobs: list[float], state: int) -> None:
        self.forest.append(branch.node, tokens)
        branch.session.counters.policy_decoded += len(tokens)
        for logprob in logprobs:  # one by one: the sum must not depend on how many came in one call
            branch.logprob += logprob
        branch.state = state
        node = branch.node
        if state == -1:
            self._end(branch, "step")
        elif state < -1:
            self._end(branch, "end")
        elif len(node.ids) >= branch.max_step_tokens or node.pos0 + len(node.ids) >= branch.max_length:
            self._end(branch, "length")

    def _end(self, branch: Branch, reason: str) -> None:
        node = branch.node
        if reason == "step" and node.pos0 + len(node.ids) >= branch.max_length:
            reason = "length"
        self._plan = None
        more = reason == "step" and branch.steps_left > 1
        end = StepEnd(node, tuple(node.ids), reason, branch.logprob, branch.key, more)
        if more:
            child = self.forest.fork(node, 1)[0]
            branch.session.policy_nodes.add(child)
            branch.session.counters.policy_reused += node.pos0 + len(node.ids)
            self.forest.release(node)
            branch.node, branch.key, branch.state, branch.logprob = child, child_key(branch.key, 0), 0, 0.0
            branch.path_key = (*branch.path_key, 0)
            branch.steps_left -= 1
        elif not branch.ahead:
            self.branches.remove(branch)
        branch.on_step(end)

    def _fail(self, branch: Branch, error: BaseException) -> None:
        self._plan = None
        if branch.ahead:  # nobody has asked for it yet; whoever does will see it fail
            self.ahead.drop(lambda other: other is branch)
            return self.ahead.claim(branch.node.parent)
        self.branches.remove(branch)
        self.forest.release(branch.node)
        branch.on_step(error)
