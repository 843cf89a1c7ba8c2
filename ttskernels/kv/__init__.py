"""KV memory and plans: pages, the forest of nodes over them, and the work items that attention runs."""

from ttskernels.kv.forest import Forest, Node
from ttskernels.kv.pool import PAGE_SIZE, ByteBudget, PagePool

__all__ = ["PAGE_SIZE", "ByteBudget", "Forest", "Node", "PagePool"]
