"""Child process of `grade.py`: one JSON pair [answer, gold] a line in, true or false a line out."""

import json
import sys

MEMORY_LIMIT_BYTES = 4 << 30


def main() -> None:
    from math_verify import parse, verify

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # not on this system: the time limit still holds
    out = sys.stdout
    sys.stdout = sys.stderr
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        answer, gold = json.loads(line)
        try:
            pair = [parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
            right = bool(verify(*pair, timeout_seconds=None))
        except Exception:  # math-verify meets every kind of malformed text; none of it is a right answer
            right = False
        print(json.dumps(right), file=out, flush=True)


if __name__ == "__main__":
    main()
