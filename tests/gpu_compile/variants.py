"""Every kernel in the forms that a GPU would run, and what each may cost. Import without TRITON_INTERPRET."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from ttskernels._triton import (
    decode_advance,
    linear,
    page_copy,
    path_aggregate,
    rms_norm,
    rope_append,
    sample,
    silu_mul,
    step_score,
    token_logprob,
)
from ttskernels._triton import tree_attention as attention
from ttskernels._triton.tiles import BOX_TABLE, EARLY_ARCHS, Tile, Tiles, lookup
from ttskernels._triton.tiles import options as launch_options

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
# Bytes of local memory of a thread that are accepted, by how a variant's name begins; none otherwise.
ACCEPTED_LOCAL = {
    "rope_append": 32,  # the range reduction of very large angles in libdevice's sin and cos
    "tree_attention-fp32": 1024,  # for checks, not for speed
    # Only tests and bench/gpu_tune.py launch these two. By Triton 3.6; 3.9 spills 32 bytes of the first, none of the second.
    "tree_attention-bf16-128-g4-large-128x128w8s2": 40,
    "tree_attention-bf16-128-tma-g4-large-128x128w8s2": 72,
}

# Large tiles that only a caller's `tiles` names: tests/gpu and bench/gpu_tune.py.
ON_REQUEST = Tile(128, 64, 8, 3, 1), Tile(128, 128, 8, 2, 1)


@dataclass(frozen=True)
class Variant:
    name: str
    arch: str
    kernel: object
    types: dict[str, str]
    constants: dict
    warps: int
    matrix_ops: tuple[str, ...] = ()  # opcodes that must appear
    in_ci: bool = False
    options: dict = field(default_factory=dict)
    waits_first: bool = False  # begins before the launch in front has ended, and reads what that writes
    programs: int = 0  # of a multiprocessor, all of which must fit at once; 0: any number

    @property
    def key(self) -> str:
        return f"{self.name}-{self.arch}"


MATRIX_OPS = {"sm_80": ("HMMA",), "sm_89": ("HMMA",), "sm_90": ("HMMA",), "sm_100": ("HMMA",), "gfx942": ("v_mfma",)}

WIDE_OPS = MATRIX_OPS | {"sm_90": ("HGMMA",), "sm_100": ("UTC",)}  # tiles of 64 rows and more


def tree_attention(arch, kv, head_dim, *, v_dim=None, heads=(32, 8), softcap=0.0, window=False, sinks=False, tile=None, ci=False,
                   tma=False, large=True):  # fmt: skip
    v_dim, scaled = v_dim or head_dim, kv in ("fp8", "e5m2")
    pool = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32", "fp8": "*fp8e5" if arch == "sm_80" else "*fp8e4nv",
            "e5m2": "*fp8e5"}[kv]  # fmt: skip
    tiles = lookup({"sm_89": "sm_80"}.get(arch, arch), head_dim, v_dim, {"fp8": 1, "e5m2": 1, "fp32": 4}.get(kv, 2))
    tile, beside = tile or (tiles.large if large else tiles.small), arch in ("sm_90", "sm_100")
    dense = "*bf16" if scaled else pool
    types = {"q": dense, "k_pages": pool, "v_pages": pool, "plan": "*i32", "out": dense, "lse": "*fp32"}
    types |= dict.fromkeys(("partial_o", "partial_ml"), "*fp32")
    types |= {"queue": "*i32", "scale": "fp32", "window": "i32"}
    strides = ("q_row", "q_head", "k_page", "k_slot", "k_head", "v_page", "v_slot", "v_head", "out_row")
    types |= dict.fromkeys(strides, "i32!")
    constants = {
        "Q_HEADS": heads[0], "KV_HEADS": heads[1], "HEAD_DIM": head_dim, "V_DIM": v_dim, "PAGE_SIZE": 16,
        "WINDOWED": window, "SOFTCAP": softcap,
        "BLOCK_M": tile.rows, "BLOCK_N": tile.tokens, "STAGES": tile.stages,
        "LARGE": large, "BESIDE": beside, "MERGED": beside,
    }  # fmt: skip
    for name, wanted in (("sinks", sinks), ("k_scale", scaled), ("v_scale", scaled)):
        (types if wanted else constants)[name] = "*fp32" if wanted else None
    for name, width in (("k_rows", head_dim), ("v_rows", v_dim)):
        (types if tma else constants)[name] = f"tensordesc<{pool[1:]}[{tile.tokens},{width}]>" if tma else None
    ops = () if kv == "fp32" else MATRIX_OPS[arch]
    if tile.rows >= 64 and ops:
        ops = WIDE_OPS[arch]  # smaller ones stay on mma.sync
    ops += ("UTMALDG",) if tma else ()
    named = {"tma": tma, "softcap": softcap, "window": window, "sinks": sinks, f"v{v_dim}": v_dim != head_dim}
    extras = "".join(f"-{name}" for name, wanted in named.items() if wanted)
    size = f"{'large' if large else 'small'}-{tile.rows}x{tile.tokens}w{tile.warps}s{tile.stages}"
    name = f"tree_attention-{kv}-{head_dim}{extras}-g{heads[0] // heads[1]}-{size}"
    options = launch_options(tile, beside and not large)
    return Variant(name, arch, attention.tree_attention_kernel, types, constants, tile.warps, ops, ci, options,
                   programs=tile.programs)  # fmt: skip


def small_ops(arch: str) -> list[Variant]:
    ci = arch in ("sm_90", "gfx942")
    i32 = dict.fromkeys
    made = [
        ("rms_norm", rms_norm.rms_norm_kernel,
         {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "eps": "fp32", "x_row": "i32!"}, {"DIM": 1536}, 4, ()),
        ("silu_mul", silu_mul.silu_mul_kernel,
         {"gate": "*bf16", "up": "*bf16", "out": "*bf16", "gate_row": "i32!", "up_row": "i32!", "dim": "i32!"},
         {"BLOCK": 1024}, 4, ()),
        ("path_aggregate", path_aggregate.path_aggregate_kernel,
         {"state": "*fp32", "scores": "*fp32", "indptr": "*i32", "out": "*fp32"}, {}, 1, ()),
        ("sample-chunk", sample.chunk_kernel,
         {"logits": "*fp32", "rows": "*i32", "settings": "*fp32", "tops": "*i32", "sums": "*fp32", "vocab": "i32!",
          "logits_row": "i32!", "chunks": "i32"}, {}, 4, ()),
        ("sample-draw", sample.draw_kernel,
         {"logits": "*fp32", "rows": "*i32", "keys": "*i64", "positions": "*i32", "settings": "*fp32", "tops": "*i32",
          "sums": "*fp32", "candidates": "*i32", "kept": "*fp32", "equals": "*i32", "tokens": "*i32",
          "logprobs": "*fp32", "vocab": "i32!", "logits_row": "i32!", "chunks": "i32"}, {"MOST_CHUNKS": 256}, 8, ()),
        ("tree_attention-merge", attention.merge_kernel,
         {"partial_o": "*fp32", "partial_ml": "*fp32", "plan": "*i32", "sinks": "*fp32", "v_scale": "*fp32", "out": "*bf16",
          "lse": "*fp32", "out_row": "i32!"},
         {"Q_HEADS": 32, "GROUP": 4, "V_DIM": 128, "WAITS": arch in ("sm_90", "sm_100")}, attention.MERGE_WARPS, ()),
        ("page_copy", page_copy.page_copy_kernel,
         {"k_pool": "*bf16", "v_pool": "*bf16", "pairs": "*i32"}
         | i32(("k_layer", "k_page", "k_slot", "k_head", "v_layer", "v_page", "v_slot", "v_head"), "i32!"),
         {"K_DIM": 128, "V_DIM": 128, "KV_HEADS": 8, "BLOCK": 1024}, 4, ()),
        ("decode_advance", decode_advance.decode_advance_kernel,
         {"sampled": "*i32", "logprobs": "*fp32", "next_state": "*i32", "plan": "*i32", "ids": "*i32", "positions": "*i32",
          "slots": "*i32", "draw_positions": "*i32", "states": "*i32", "iterations": "*i32", "report": "*i32",
          "vocab": "i32", "capacity": "i32!"}, {"BAD": -(1 << 30), "RING": 4, "BLOCK": 512}, 4, ()),
        ("step_score-head", step_score.head_kernel,
         {"hidden": "*bf16", "rows": "*i32", "norm_weight": "*bf16", "weight": "*bf16", "mix": "*fp32",
          "scores": "*fp32", "eps": "fp32", "hidden_row": "i32!"},
         {"bias": None, "DIM": 3584, "LABELS": 2, "SQUASH": "softmax"}, 8, ()),
        ("step_score-head-sigmoid", step_score.head_kernel,  # behind an inner layer
         {"hidden": "*fp32", "weight": "*bf16", "bias": "*bf16", "scores": "*fp32", "eps": "fp32", "hidden_row": "i32!"},
         {"rows": None, "norm_weight": None, "mix": None, "DIM": 3584, "LABELS": 1, "SQUASH": "sigmoid"}, 8, ()),
        *((f"step_score-inner-{m}x{n}", step_score.inner_kernel,
           {"hidden": "*bf16", "rows": "*i32", "norm_weight": "*bf16", "weight": "*bf16", "bias": "*bf16", "out": "*fp32",
            "n": "i32", "inner": "i32!", "eps": "fp32", "hidden_row": "i32!"},
           {"DIM": 3584, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64}, 4, (WIDE_OPS if m >= 64 else MATRIX_OPS)[arch])
          for m, n in ((16, 32), (64, 64))),
    ]  # fmt: skip
    for n in (16, 64, 1024):
        m, n_block, k, warps, stages = token_logprob.choose_blocks(n, 2, arch)
        made.append((f"token_logprob-run-{m}x{n_block}", token_logprob.run_kernel,
                     {"x": "*bf16", "lm_head": "*bf16", "ids": "*i32", "partial": "*fp32", "n": "i32", "vocab": "i32",
                      "head_row": "i32!"},
                     {"DIM": 3584, "BLOCK_M": m, "BLOCK_N": n_block, "BLOCK_K": k, "STAGES": stages}, warps,
                     WIDE_OPS[arch] if m >= 64 else MATRIX_OPS[arch]))  # fmt: skip
    made += [
        ("token_logprob-gather", token_logprob.gather_norm_kernel,
         {"hidden": "*fp32", "rows": "*i32", "norm_weight": "*bf16", "x": "*bf16", "eps": "fp32", "hidden_row": "i32!"},
         {"DIM": 3584}, 8, ()),
        ("token_logprob-merge", token_logprob.merge_kernel,
         {"partial": "*fp32", "logprobs": "*fp32", "n": "i32", "runs": "i32"}, {"BLOCK": 512}, 4, ()),
    ]  # fmt: skip
    made += rope_appends(arch)
    if arch in EARLY_ARCHS:
        made += own_products(arch)
    options = {"sample-draw": {"maxnreg": 255}} if arch.startswith("sm_") else {}
    return [Variant(name, arch, kernel, t, c, warps, ops, ci, options.get(name, {}), bool(c.get("EARLY") or c.get("WAITS")))
            for name, kernel, t, c, warps, ops in made]  # fmt: skip


def rope_appends(arch: str) -> list[tuple]:
    """Over bf16 and float8 pages, of rows that one product made or that are to be added up."""
    strides = ("q_row", "q_head", "k_row", "k_head", "v_row", "v_head")
    pages = ("k_page", "k_slot", "k_page_head", "v_page", "v_slot", "v_page_head")
    float8, made = "*fp8e5" if arch == "sm_80" else "*fp8e4nv", []
    kinds = [(norm, "bf16", False) for norm in (False, True)] + [(True, "fp8", False), (True, "fp8", True)]
    for norm, kv, scaled in kinds:
        pool = float8 if kv == "fp8" else "*bf16"
        types = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "inv_freq": "*fp32", "positions": "*i32", "slots": "*i32",
                 "out": "*bf16", "k_pages": pool, "v_pages": pool, "rope_scale": "fp32", "eps": "fp32"}  # fmt: skip
        types |= dict.fromkeys((*strides, "part", *pages), "i32!")
        constants = {"Q_HEADS": 32, "HEAD_DIM": 128, "V_DIM": 128, "PAIRS": 64, "PAGE_SIZE": 16, "BLOCK_PAIRS": 64, "bias": None,
                     "PARTS": 1, "EARLY": False, "MOST": {"*fp8e5": 57344.0, "*fp8e4nv": 448.0}.get(pool)}  # fmt: skip
        for names, wanted, kind in ((("q_norm", "k_norm"), norm, "*bf16"), (("k_scale", "v_scale"), scaled, "*fp32")):
            (types if wanted else constants).update(dict.fromkeys(names, kind if wanted else None))
        name = "rope_append" + "-fp8" * (kv == "fp8") + "-scaled" * scaled + "-norm" * norm
        made.append((name, rope_append.rope_append_kernel, types, constants, 1, ()))
        if arch in EARLY_ARCHS and not scaled:
            types = types | {"bias": "*bf16"} | dict.fromkeys("qkv", "*fp32")
            constants = {k: v for k, v in constants.items() if k != "bias"} | {"PARTS": 4, "EARLY": True}
            made.append((f"{name}-parts", rope_append.rope_append_kernel, types, constants, 1, ()))
    return made


def own_products(arch: str) -> list[tuple]:
    """The products of a decode iteration and the norm behind them, at sizes of Qwen2.5-1.5B."""
    made = []
    for rows, gated in itertools.product((16, 64, 128), (False, True)):
        tile = linear.choose_tile(rows, 8960 if gated else 1536, 1536, 2, gated, 132)
        boxes = {"x_rows": tile.rows, "w_rows": tile.outputs}
        types = {name: f"tensordesc<bf16[{n},{tile.inputs}]>" for name, n in boxes.items()} | {
                 "w": "*bf16", "out": "*bf16" if gated else "*fp32", "rows": "i32"}  # fmt: skip
        types |= dict.fromkeys(("outputs", "inputs", "part_inputs"), "i32!")
        constants = {"BLOCK_M": tile.rows, "BLOCK_N": tile.outputs, "BLOCK_K": tile.inputs, "STAGES": tile.stages, "GATED": gated,
                     "AHEAD": tile.ahead, "EARLY": True}  # fmt: skip
        name = f"linear-{'gated' if gated else 'parts'}-{tile.rows}x{tile.outputs}s{tile.stages}"
        made.append((name, linear.linear_kernel, types, constants, tile.warps, (*WIDE_OPS[arch], "UTMALDG", "UBLKPF")))
    types = {"parts": "*fp32", "x": "*bf16", "bias": "*bf16", "weight": "*bf16", "out": "*bf16", "eps": "fp32", "rows": "i32",
             "x_row": "i32!"}  # fmt: skip
    constants = {"PARTS": 11, "DIM": 1536, "EARLY": True}
    return [*made, ("add_rms_norm", rms_norm.add_rms_norm_kernel, types, constants, rms_norm.warps(1536), ())]


def variants() -> list[Variant]:
    made = []
    for arch in ARCHS:
        for head_dim in (64, 80, 96, 128, 192, 256):
            for kv in ("bf16", "fp8"):
                ci = head_dim == 128 and (kv == "bf16" or arch in ("sm_89", "sm_90"))
                made += [tree_attention(arch, kv, head_dim, ci=ci and large, large=large) for large in (True, False)]
        made += [
            tree_attention(arch, "fp16", 64),
            *(tree_attention(arch, "fp32", d, ci=arch == "sm_89" and d == 256) for d in (64, 128, 256)),
            *([tree_attention(arch, "bf16", 128, heads=(28, 4))] if arch != "sm_90" else []),
            tree_attention(arch, "bf16", 64, heads=(16, 1), softcap=30.0, sinks=True, ci=arch == "sm_90"),
            tree_attention(arch, "bf16", 192, v_dim=128),
            tree_attention(arch, "bf16", 128, heads=(12, 2), softcap=30.0, window=True, sinks=True, ci=arch == "sm_90"),
            tree_attention(arch, "fp8", 128, window=True),
        ]
        if arch in EARLY_ARCHS:  # the other float8
            made += [tree_attention(arch, "e5m2", d, large=large) for d in (64, 128, 256) for large in (True, False)]
        made += small_ops(arch)
    for tma in (False, True):
        tiles = BOX_TABLE["sm_90", 128, 2] if tma else Tiles(None, None)
        made.append(tree_attention("sm_90", "bf16", 128, window=True, tma=tma, tile=tiles.large))
        made.append(tree_attention("sm_90", "bf16", 128, window=True, tma=tma, tile=tiles.small, large=False))
        made.append(tree_attention("sm_90", "bf16", 128, heads=(28, 4), tma=tma))
        made.append(tree_attention("sm_90", "bf16", 128, softcap=30.0, window=True, sinks=True, tma=tma, tile=tiles.large))
        made.append(tree_attention("sm_90", "bf16", 128, softcap=30.0, window=True, sinks=True, tma=tma, tile=tiles.small,
                                   large=False))  # fmt: skip
        for tile in ON_REQUEST:
            made += [tree_attention("sm_90", "bf16", head_dim, tma=tma, tile=tile) for head_dim in (64, 128)]
    for (arch, head_dim, size), tiles in BOX_TABLE.items():
        for large, tile in ((True, tiles.large), (False, tiles.small)):
            kv = {2: "bf16", 1: "fp8"}[size]
            made.append(tree_attention(arch, kv, head_dim, tile=tile, tma=True, ci=head_dim == 128, large=large))
            if size == 1:
                made.append(tree_attention(arch, "e5m2", head_dim, tile=tile, tma=True, large=large))
    return made
