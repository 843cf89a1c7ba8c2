"""What fixed-point weights, K and V cost in accuracy: mean KL(exact || other) and share of equal argmax over real text.

    python bench/int8_accuracy.py --model SmolLM2-135M-Instruct --texts gsm8k.jsonl --out bench/results/int8.json
    python bench/int8_accuracy.py --model ... --texts ... --weights calibrated  int8 as `ttsearch calibrate` rounded it
    python bench/int8_accuracy.py --model ... --texts ... --weights int16       fixed point, as bf16 models run by default
    python bench/int8_accuracy.py --model ... --texts ... --weights int16 --against int16 --kv int8       pages alone
    python bench/int8_accuracy.py --model ... --texts ... --weights int16 --kv int16 --against-dtype fp32  all of a bf16 model

Both models read the same ids (questions and solutions of a JSON-lines file, the fields --fields, one text after the other) and
their next-token distributions are compared at every position, in float64. An int8 speed counts only if the mean KL is at most
0.01 nats and at least 98 % of the argmaxes are equal. A text is a chunk: the file is written after each, and a second call goes
on where the first ended.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

import ttskernels
from ttskernels.kv.forest import Forest
from ttskernels.kv.plan import build_plan
from ttskernels.models import Model, load_model

MAX_KL, MIN_EQUAL = 0.01, 0.98


def logits_of(model: Model, ids: list[int]) -> torch.Tensor:
    """`[tokens, vocab]` float32: the prediction at every token."""
    forest = Forest(model.new_pool(len(ids) // 16 + 2))
    node = forest.add(None, ids)
    forest.reserve([node], [0])
    plan = build_plan(forest, [(node, 0, len(ids))], model.heads)
    rows = torch.arange(len(ids), dtype=torch.int32)
    return model.forward(torch.tensor(ids, dtype=torch.int32), plan, forest.pool, rows)


def compare(exact: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(exact || other) in nats and whether the argmax is the same, of each row."""
    p, q = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1), exact.argmax(-1) == other.argmax(-1)


def chunks(tokenizer, path: Path, fields: list[str], limit: int, longest: int) -> list[list[int]]:
    """Ids of each text, at most `longest`, up to `limit` in all."""
    out, left = [], limit
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        missing = [field for field in fields if field not in entry]
        if missing:
            raise SystemExit(f"--fields must name fields of {path}, which has {', '.join(entry)}; got {', '.join(missing)}")
        ids = tokenizer("\n".join(str(entry[field]) for field in fields)).input_ids[: min(left, longest)]
        if len(ids) > 1:
            out.append(ids)
            left -= len(ids)
        if left <= 1:
            break
    return out


def summary(record: dict) -> dict:
    tokens = sum(chunk["tokens"] for chunk in record["chunks"])
    kl = sum(chunk["kl_sum"] for chunk in record["chunks"]) / max(tokens, 1)
    equal = sum(chunk["equal"] for chunk in record["chunks"]) / max(tokens, 1)
    worst = max((chunk["kl_max"] for chunk in record["chunks"]), default=0.0)
    passed = kl <= MAX_KL and equal >= MIN_EQUAL
    return {"tokens": tokens, "mean_kl_nats": kl, "max_kl_nats": worst, "equal_argmax": equal, "counts": passed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, hub id or .gguf file")
    parser.add_argument("--texts", type=Path, required=True, help="JSON lines")
    parser.add_argument("--fields", nargs="+", default=["question", "answer"], help="of a line; joined by line ends")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--weights", choices=("calibrated", "int8", "int16", "float"), default="int8", help="what is measured")
    parser.add_argument("--against", choices=("int16", "float"), default="float", help="float: bf16 products, as elsewhere")
    parser.add_argument("--kv", choices=("int8", "int16", "float"), default="float", help="pages of what is measured")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of what is measured")
    parser.add_argument("--against-dtype", choices=("bf16", "fp32"), default="bf16", help="its pages are float")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from ttsearch.dtypes import torch_dtype
    from ttsearch.tokenizer import load_tokenizer

    settings = {name: getattr(args, name) for name in ("fields", "tokens", "weights", "against", "kv", "dtype", "against_dtype")}
    settings |= {"model": "/".join(Path(args.model).parts[-2:]), "texts": args.texts.name}
    record = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    if record.setdefault("settings", settings) != settings:
        raise SystemExit(f"{args.out} holds a run of {record['settings']}, not {settings}; choose another --out")
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    record |= {"bench": "int8_accuracy", "command": shlex.join(["python", "bench/int8_accuracy.py", *words])}
    record["isa"], record["version"] = ttskernels.isa_name(), ttskernels.__version__
    done = record.setdefault("chunks", [])
    exact = load_model(args.model, torch_dtype(args.against_dtype), weights=args.against, kv="float")
    other = load_model(args.model, torch_dtype(args.dtype), weights=args.weights, kv=args.kv)
    texts = chunks(load_tokenizer(args.model), args.texts, args.fields, args.tokens, exact.config.max_positions)
    for ids in texts[len(done) :]:
        kl, equal = compare(logits_of(exact, ids), logits_of(other, ids))
        done.append({"tokens": len(ids), "kl_sum": kl.sum().item(), "kl_max": kl.max().item(), "equal": int(equal.sum())})
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(record | {"summary": summary(record)}, indent=1) + "\n")
        if len(done) % 10 == 0:
            now = summary(record)
            kl, equal = now["mean_kl_nats"], now["equal_argmax"]
            print(f"{now['tokens']:6,} tokens  mean KL {kl:.5f} nats  equal argmax {100 * equal:.2f} %", flush=True)
    print(json.dumps(summary(record)))


if __name__ == "__main__":
    main()
