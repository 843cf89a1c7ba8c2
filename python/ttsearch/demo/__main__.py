"""`python -m ttsearch.demo [dev|test]`: the held-out problems of the demo task as JSONL, for `ttsearch evaluate`."""

import json
import sys

from .task import dev_problems, solution, test_problems


def main() -> int:
    part = sys.argv[1] if len(sys.argv) > 1 else "test"
    if part not in ("dev", "test"):
        print(f"part must be dev or test, got {part!r}", file=sys.stderr)
        return 2
    for problem in dev_problems() if part == "dev" else test_problems():
        answer = solution(problem).rsplit("{", 1)[1].rstrip("}")
        level = (len(problem.operations) + 1) // 2
        print(json.dumps({"problem": problem.prompt, "answer": answer, "level": level}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
