"""Errors that are not plain TypeError / ValueError: a resource ran out, or a handle is no longer valid."""


class OutOfPagesError(RuntimeError):
    """A reserve needs more KV pages than are free. Nothing has changed; release or evict nodes and try again."""


class ReleasedNodeError(RuntimeError):
    """A verb was called on a forest node that was already released."""


class UnavailableError(RuntimeError):
    """The asked implementation cannot run here; the message says why and what to do."""
