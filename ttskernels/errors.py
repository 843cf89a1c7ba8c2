"""Errors that are not plain TypeError / ValueError: a resource ran out, or a handle is no longer valid."""


class OutOfPagesError(RuntimeError):
    """A reserve needs more KV pages than are free. Nothing has changed; release or evict nodes and try again."""


class ReleasedNodeError(RuntimeError):
    """A verb was called on a forest node that was already released."""


class BadLogitsError(ValueError):
    """Logits of `row` are not finite. The other rows of the call are as they were, and may be computed without it."""

    def __init__(self, message: str, row: int):
        super().__init__(message)
        self.row = row


class UnavailableError(RuntimeError):
    """The asked implementation cannot run here; the message says why and what to do."""
