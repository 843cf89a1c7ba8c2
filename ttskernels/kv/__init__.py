"""KV memory and plans: pages, the forest of nodes over them, and the work items that attention runs."""

from ttskernels.kv.block_tables import plan_from_block_tables
from ttskernels.kv.forest import Forest, Node
from ttskernels.kv.plan import Plan, build_plan, plan_from_parents
from ttskernels.kv.plan_layout import HeadShape, Machine, PlanStats
from ttskernels.kv.pool import PAGE_SIZE, ByteBudget, PagePool

__all__ = [
    "PAGE_SIZE", "ByteBudget", "Forest", "HeadShape", "Machine", "Node", "PagePool", "Plan", "PlanStats",
    "build_plan", "plan_from_block_tables", "plan_from_parents",
]  # fmt: skip
