"""The engine: one thread that owns models, forests and pages, and runs whatever is waiting across all problems.

Callers talk to it by queue and get futures and callbacks; they hold nodes as opaque handles and never see tensors.
Decode iterations of all problems share one batch; score jobs gather until a forward is worth its weight reads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future

import torch

from ttskernels.engine.ahead import Decoding, Wish
from ttskernels.engine.checks import check_ids, check_model, check_prompt
from ttskernels.engine.commands import Commands, tell
from ttskernels.engine.policy import PolicyRunner
from ttskernels.engine.reading import check_reads
from ttskernels.engine.residency import Residency
from ttskernels.engine.scorer import ScoreRunner
from ttskernels.engine.sessions import Sessions
from ttskernels.engine.work import Sampling, ScoreJob, Session, StepEnd
from ttskernels.kv.forest import Forest, Node
from ttskernels.kv.pool import PAGE_SIZE, ByteBudget

SCORE_ROWS = 128  # verifier rows worth a forward of their own while branches still decode
POLL_SECONDS = 2e-4  # between looks at scores that a GPU computes, while there is nothing else to do
SCORE_PATIENCE = 8  # engine turns that score jobs wait for company at most


class Engine:
    """Runs a policy, a verifier or both on one device within one KV byte budget.

    Args:
        policy: a `Model`, or None to score alone; `verifier`: a `Model` with a score head, or None. One model may be both
            (`load_model(..., head=HeadSpec(...), keep_lm_head=True)`): then it has one forest, and what a branch decoded
            may be scored as it stands.
        next_state: `[states, vocab]` int32 stop automaton of the policy's tokenizer (docs/internals.md).
        kv_bytes: budget of both forests together.
        prompt_bytes: of pages that prompts of closed sessions may keep, until somebody needs them: a session that opens with
            the same ids does not compute them.
        ahead_rows: a decode iteration with fewer rows is filled up with children of `ahead` that will perhaps be asked for, and
            scores do not wait for company; 0: nothing is begun ahead.
    Raises:
        ValueError: no model at all, a policy without its automaton, a verifier without a score head.
    """

    def __init__(
        self,
        policy=None,
        verifier=None,
        *,
        next_state: torch.Tensor | None = None,
        kv_bytes: int = 4 << 30,
        prompt_bytes: int = 0,
        ahead_rows: int = 0,
    ):
        if policy is None and verifier is None:
            raise ValueError("Engine needs a policy, a verifier or both, got neither")
        self.policy_model, self.verifier_model, self.ahead_rows = policy, verifier, ahead_rows
        self.budget = ByteBudget(kv_bytes)
        residency = Residency()
        self.policy_forest = self._policy = self.verifier_forest = self._scorer = None
        if policy is not None:
            self.policy_forest = Forest(policy.new_pool(self._pages(policy), self.budget))
            residency.forests.append((self.policy_forest, lambda session: session.policy_nodes))
            self._policy = PolicyRunner(policy, self.policy_forest, residency, next_state, ahead_rows)
            residency.busy_before = self._policy.busy_before
            residency.spares.append((self.policy_forest, self._policy.ahead.spare_nodes))
        if verifier is not None and verifier is policy:
            self.verifier_forest = self.policy_forest
        elif verifier is not None:
            self.verifier_forest = Forest(verifier.new_pool(self._pages(verifier), self.budget))
        if verifier is not None:
            residency.forests.append((self.verifier_forest, lambda session: session.verifier_nodes))
            self._scorer = ScoreRunner(verifier, self.verifier_forest, residency)
        self._sessions = Sessions(residency, self.budget, self._policy, self._scorer, prompt_bytes)
        self._commands = Commands()
        self._patience = SCORE_PATIENCE
        self._thread = threading.Thread(target=self._loop, name="ttskernels-engine", daemon=True)
        self._thread.start()

    # -- calls from any thread ---------------------------------------------------------------------------------------

    def open(
        self,
        prompt: list[int] | None,
        verifier_prompt: list[int] | None = None,
        *,
        max_new_tokens: int = 0,
        beside: Session | None = None,
    ) -> Session:
        """Start a problem. Refused if one path of `max_new_tokens` alone would not fit into the models or the budget.

        Args:
            prompt: the policy's ids, `verifier_prompt`: the verifier's; None where that side has nothing to do.
            beside: an open session of the same problem, whose age (and so whose turn) this one shares.
        Raises:
            ValueError: empty prompt, ids outside the vocabulary, a prompt longer than the model allows, budget too small.
        """
        if prompt is None and verifier_prompt is None:
            raise ValueError("prompt and verifier_prompt are both None; a session needs one of them")
        # The verifier's tokens of a path are about the policy's; its own pages may be evicted between batches.
        policy_bytes = self._budget(self.policy_model, self.policy_forest)
        verifier_bytes = self._budget(self.verifier_model, self.verifier_forest)
        check_prompt("prompt", prompt, "policy", self.policy_model, len(prompt or ()) + max_new_tokens, 1, policy_bytes)
        length = len(verifier_prompt or ()) + max_new_tokens
        check_prompt("verifier_prompt", verifier_prompt, "verifier", self.verifier_model, length, 2, verifier_bytes)
        return self._commands.call(lambda: self._sessions.open(prompt, verifier_prompt, beside)).result()

    def branch(
        self,
        session: Session,
        parent: Node,
        *,
        key: int,
        ordinals: Iterable[int],
        path_key: tuple[int, ...],
        sampling: Sampling,
        max_step_tokens: int,
        max_length: int,
        max_steps: int = 1,
        group: object = None,
        on_step: Callable[[int, StepEnd | BaseException], None],
    ) -> None:
        """Fork `parent` once per ordinal and decode every child to its step end, or through up to `max_steps` steps.

        `key` is the parent's; `max_length` counts the whole path, prompt included. `on_step(ordinal, end)` is called
        on the engine's thread at each step end and must return quickly. `cancel(group)` drops what is not done.
        """
        max_length = min(max_length, self.policy_model.config.max_positions)
        ordinals = list(ordinals)

        def start() -> None:
            try:
                if parent.pos0 + len(parent.ids) >= max_length:
                    raise ValueError(f"the path has reached its limit of {max_length} tokens; it cannot be continued")
                children = self._policy.children(
                    session, parent, key, path_key, ordinals, Decoding(sampling, max_step_tokens, max_length), max_steps
                )
            except Exception as error:
                for ordinal in ordinals:
                    on_step(ordinal, error)
                return
            for ordinal, branch in zip(ordinals, children, strict=True):
                branch.group, branch.on_step = group, lambda end, o=ordinal: on_step(o, end)
                if branch.end is not None:
                    branch.on_step(branch.end)
                else:
                    self._policy.add(branch)

        def refused(error: BaseException) -> None:
            for ordinal in ordinals:
                on_step(ordinal, error)

        self._commands.call(start, refused)

    def ahead(
        self,
        session: Session,
        wishes: Iterable[Wish],
        *,
        sampling: Sampling,
        max_step_tokens: int,
        max_length: int,
        group: object,
    ) -> None:
        """Children that `branch` will be asked for, or perhaps, best first: begin them beside what is being decoded.

        The list takes the place of the group's last one. A child of it is the one that `branch` would begin, to the last
        bit; those of a parent that is released are dropped, and their tokens counted as speculated.
        """
        decoding = Decoding(sampling, max_step_tokens, min(max_length, self.policy_model.config.max_positions))
        wishes = list(wishes)

        def run() -> None:
            if not session.closed:
                self._policy.wish(group, session, decoding, [w for w in wishes if not w.parent.released])

        self._commands.tidy(run)

    def score(
        self,
        session: Session,
        parent: Node,
        ids: list[int],
        reads: list[int],
        keep: int | None = None,
        targets: list[int] | None = None,
    ) -> Future:
        """Append `ids` behind the chain of `parent` in the verifier's forest and score those at `reads`.

        Args:
            reads: indices into `ids`.
            keep: tokens of the chain, from its beginning, that stay in front of `ids`; None: all of it. A smaller one
                hangs `ids` below the ancestor that holds token `keep - 1`, which is cut in two if it goes on behind it.
            targets: for a `PairModel`, the token behind each of `reads`: a score is its log-ratio. There the first read may
                be -1, the last token in front of `ids`, which costs a row and no KV.
        Returns:
            A future of (the new node, one score for each of `reads`). The node holds a handle for the caller.
            It raises ValueError for a path too long for the model, and for hidden states or scores that are not finite.
        """
        check_model("ids", self.verifier_model)
        check_ids("ids", ids, self.verifier_model)
        if targets:
            check_ids("targets", targets, self.verifier_model)
        check_reads(self.verifier_model, ids, reads, targets)
        result: Future = Future()
        job = ScoreJob(session, parent, list(ids), list(reads), result, list(targets or ()))

        def submit() -> None:
            if session.closed or parent.released:
                result.cancel()
                return
            try:
                self._scorer.submit(job, keep)
            except Exception as error:
                result.set_exception(error)

        self._commands.call(submit, lambda error: tell(result, error))
        return result

    def extend(self, session: Session, parent: Node | None, ids: list[int], keep: int | None = None) -> Future:
        """Put `ids` behind the chain of `parent` in the policy's forest, to branch from; nothing is computed yet.

        Args:
            parent: None begins a chain. keep: as in `score`, for an engine whose verifier is its policy; `ids` may then be
                empty.
        Returns:
            A future of the node that ends the chain. It holds a handle for the caller.
        """
        if ids or keep is None:
            check_ids("ids", ids, self.policy_model)

        def run() -> Node:
            forest, above = self.policy_forest, parent
            if keep is not None:
                above = self._scorer.rolled_back(parent, keep, session)
            if above is not None:
                forest.retain(above)
            if not ids:
                return above
            node = forest.add(above, ids)
            node.owner = session
            session.policy_nodes.add(node)
            if above is not None:
                forest.release(above)
            return node

        return self._commands.call(run)

    def cancel(self, group: object) -> None:
        """Drop the branches of a group; steps already reported stay with the caller."""

        def run() -> None:
            self._policy.drop(lambda branch: branch.group is group)
            self._policy.ahead.forget(group)

        self._commands.tidy(run)

    def release(self, session: Session, *, policy: Iterable[Node] = (), verifier: Iterable[Node] = ()) -> None:
        """Give back handles that branch ends and score jobs returned."""
        policy, verifier = list(policy), list(verifier)

        def run() -> None:
            if session.closed:
                return
            for node in policy:
                self.policy_forest.release(node)
                if node.refs == 0:
                    self._policy.ahead.release(node)
            for node in verifier:
                self.verifier_forest.release(node)

        self._commands.tidy(run)

    def retain(self, verifier: Node) -> None:
        """One more handle on a node of the verifier's forest, to be released like any other."""
        self._commands.call(lambda: self.verifier_forest.retain(verifier))

    def close(self, session: Session) -> None:
        """Drop the session's branches and jobs and release all its nodes. Idempotent."""
        self._commands.tidy(lambda: self._sessions.close(session), wait=True)

    def forget_prompts(self) -> None:
        """Give back the pages that prompts of closed sessions keep."""
        self._commands.tidy(self._sessions.forget_prompts, wait=True)

    def shutdown(self) -> None:
        """Stop the engine's thread and free its KV. Sessions still open are closed; what they wait for, and every later call
        for work, raises RuntimeError."""
        if self._thread.is_alive():
            self._commands.end()
            self._thread.join()
        for model, forest in ((self.policy_model, self.policy_forest), (self.verifier_model, self.verifier_forest)):
            if forest is not None:
                model.forget_pool(forest.pool)
                forest.pool.free()

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def _loop(self) -> None:
        busy = False
        try:
            while True:
                waiting = self._scorer is not None and bool(self._scorer.running)
                for command in self._commands.take(block=not busy, timeout=POLL_SECONDS if waiting else None):
                    if command is None:
                        return self._stop(RuntimeError("the engine was shut down; make another one"))
                    function, result = command
                    if not result.set_running_or_notify_cancel():  # whoever asked has given up
                        continue
                    try:
                        result.set_result(function())
                    except BaseException as error:
                        result.set_exception(error)
                busy = self._turn()
        except BaseException as error:  # a bug of ours: everyone waiting must hear of it
            self._abort(error)

    def _turn(self) -> bool:
        """One batch of work. Scores first when they are worth a forward; else decode; else whatever scores wait."""
        scorer, policy = self._scorer, self._policy
        decoding = policy is not None and bool(policy.branches)
        if scorer is not None and scorer.jobs:
            self._patience -= 1
            short = decoding and len(policy.branches) < policy.ahead_rows  # scores say what may be started ahead
            if not decoding or short or self._patience <= 0 or scorer.waiting_rows >= SCORE_ROWS:
                self._patience = SCORE_PATIENCE
                if scorer.step():
                    self._sessions.note_peak()
                    return True
                if scorer.jobs and not decoding:
                    scorer.fail_first()
                    return True
        try:
            worked = policy.step() if decoding else False
        except (ValueError, RuntimeError) as error:  # for example non-finite logits: the running problems hear of it
            policy.abort(error)
            worked = True
        self._sessions.note_peak()
        if scorer is None:
            return worked
        scorer.collect()
        return worked or bool(scorer.jobs)

    def _stop(self, error: BaseException) -> None:
        """Let what is under way finish, tell everyone else, and give back all pages."""
        if self._scorer is not None:
            self._scorer.collect(wait=True)
        self._abort(error)
        self._sessions.close_all()

    def _abort(self, error: BaseException) -> None:
        self._commands.stop(error)
        if self._policy is not None:
            self._policy.abort(error)
        if self._scorer is not None:
            for job in (job for batch in self._scorer.running for job in batch.jobs):
                job.result.set_exception(error)
            for job in self._scorer.jobs:
                tell(job.result, error)

    def _pages(self, model) -> int:
        """Pages of a model's pool: what the budget can pay. A pool on a GPU has its memory from the start, so that two of
        them must share it: for as many tokens each, as the verifier reads what the policy writes."""
        sharing = {self.policy_model, self.verifier_model} - {None} if model.reserves_pool else {model}
        return max(1, self.budget.total_bytes // (sum(m.kv_bytes_per_token for m in sharing) * PAGE_SIZE))

    def _budget(self, model, forest) -> int:
        """Bytes that one path may take: what a pool on a GPU has for itself, elsewhere everything."""
        return forest.pool.num_pages * forest.pool.page_bytes if model and model.reserves_pool else self.budget.total_bytes
