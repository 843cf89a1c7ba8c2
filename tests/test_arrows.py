"""The arrows of docs/internals.md: ttsearch -> engine -> models -> kv -> ops -> backends; nothing points up."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = [
    "ttskernels._reference",
    "ttskernels.ops",
    "ttskernels.kv",
    "ttskernels.models",
    "ttskernels.engine",
    "ttskernels.integrations",
    "ttsearch",
]
SOURCES = sorted([*ROOT.glob("ttskernels/**/*.py"), *ROOT.glob("python/ttsearch/**/*.py")])


def module_of(path: Path) -> str:
    parts = (
        path.relative_to(ROOT / "python" if "python" in path.relative_to(ROOT).parts else ROOT).with_suffix("").parts
    )
    return ".".join(parts)


def level(module: str) -> int | None:
    found = [i for i, name in enumerate(LEVELS) if module == name or module.startswith(name + ".")]
    return found[0] if found else None


def imports(path: Path) -> set[str]:
    package = module_of(path).split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(p for p in (base, node.module) if p)
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_points_up(path):
    own = level(module_of(path))
    for name in imports(path):
        target = level(name)
        if own is not None and target is not None:
            assert target <= own, f"{path.relative_to(ROOT)} imports {name}, which is a higher layer"
        if module_of(path).startswith("ttskernels"):
            assert not name.startswith("ttsearch"), f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", [p for p in SOURCES if module_of(p).startswith("ttskernels")], ids=lambda p: p.stem)
def test_no_text_below_the_line(path):
    names = imports(path)
    assert not any(n.split(".")[0] == "tokenizers" or "Tokenizer" in n.split(".")[-1] for n in names)
    assert not any(n in {"rich", "typer"} for n in names)


@pytest.mark.parametrize("path", sorted((ROOT / "python/ttsearch/strategies").glob("*.py")), ids=lambda p: p.stem)
def test_strategies_see_no_tensors(path):
    assert not any(n.split(".")[0] in {"torch", "numpy", "ttskernels", "transformers"} for n in imports(path))


def test_backends_do_not_import_each_other():
    for path in ROOT.glob("ttskernels/_reference/*.py"):
        assert not any(n.startswith(("ttskernels._triton", "ttskernels.ops")) for n in imports(path)), path
