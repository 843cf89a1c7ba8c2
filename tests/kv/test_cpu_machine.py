"""The planner's constants: where they come from, what is kept, what is refused. Nothing here depends on a measured number."""

import json
import os

import pytest

from ttskernels._cache import cache_root
from ttskernels.kv import cpu_machine as module
from ttskernels.kv.cpu_machine import cpu_machine, machine_file, read_machine
from ttskernels.kv.plan import build_plan, plan_from_parents
from ttskernels.kv.plan_layout import HeadShape, Machine

KNOWN = Machine(workers=3, flops_per_second=1e11, bytes_per_second=5e9, partial_bytes_per_second=1e10, item_us=7.0)
HEADS = HeadShape(8, 2, 64, 64, 2)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A cache of its own, nothing remembered, and a measurement that says when it is made."""
    measured = []
    monkeypatch.setenv("TTSK_CACHE", str(tmp_path))
    monkeypatch.delenv("TTSK_MACHINE")
    monkeypatch.setattr(module, "measure", lambda: measured.append(1) or KNOWN)
    cpu_machine.cache_clear()
    yield measured
    cpu_machine.cache_clear()


def test_the_suite_uses_what_is_built_in(monkeypatch):
    monkeypatch.undo()
    assert os.environ["TTSK_MACHINE"] == "default", "set by tests/conftest.py unless the caller says otherwise"


def test_measured_once_and_kept(fresh, cpu_extension):
    assert cpu_machine() == KNOWN and cpu_machine() == KNOWN and fresh == [1]
    cpu_machine.cache_clear()
    assert cpu_machine() == KNOWN and fresh == [1], "another process reads the file"
    record = json.loads(machine_file().read_text())
    assert set(record["machine"]) == set(module.MEASURED) and record["isa"].replace("_", "-") in machine_file().name
    assert list(machine_file().parent.iterdir()) == [machine_file()]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'machine'"),
        ('{"machine": 3}', "TypeError"),
        ('{"machine": {"cores": 2}}', r"unknown \['cores'\]"),
        ('{"machine": {"item_us": "2"}}', "no finite numbers: {'item_us': '2'}"),
        ('{"machine": {"item_us": true}}', "no finite numbers"),
        ('{"machine": {"item_us": NaN}}', "no finite numbers"),
        ('{"machine": {"bytes_per_second": -1.0}}', "every field of Machine must be positive"),
    ],
)
def test_a_damaged_file_is_measured_again_and_a_named_one_refused(fresh, monkeypatch, cpu_extension, content, reason):
    machine_file().parent.mkdir()
    machine_file().write_text(content)
    with pytest.warns(UserWarning, match=rf"constants in .*json must be .*, got .*{reason}.*; measuring again"):
        assert cpu_machine() == KNOWN
    assert fresh == [1] and read_machine(machine_file()) == KNOWN
    machine_file().write_text(content)
    monkeypatch.setenv("TTSK_MACHINE", str(machine_file()))
    cpu_machine.cache_clear()
    with pytest.raises(ValueError, match=reason):
        cpu_machine()
    assert fresh == [1] and module.describe().startswith("unusable: the planner's constants")


def test_the_environment_says_where_they_come_from(fresh, monkeypatch, tmp_path, cpu_extension):
    monkeypatch.setenv("TTSK_MACHINE", "default")
    assert cpu_machine() == Machine() and "built in" in module.describe()
    (tmp_path / "mine.json").write_text('{"machine": {"workers": 5, "item_us": 3}}')
    monkeypatch.setenv("TTSK_MACHINE", str(tmp_path / "mine.json"))
    cpu_machine.cache_clear()
    assert cpu_machine() == Machine(workers=5, item_us=3.0) and "5 workers" in module.describe()
    monkeypatch.setenv("TTSK_MACHINE", str(tmp_path / "absent.json"))
    cpu_machine.cache_clear()
    with pytest.raises(ValueError, match="absent.json must be"):
        cpu_machine()
    assert not fresh and not (tmp_path / "machines").exists()


def test_a_cache_that_cannot_be_written_is_said(fresh, monkeypatch, tmp_path, cpu_extension):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TTSK_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="constants cannot be kept .*; set TTSK_CACHE or TTSK_MACHINE"):
        assert cpu_machine() == KNOWN


@pytest.mark.parametrize("broken", ["is_file", "home"])
def test_a_cache_that_cannot_be_reached_is_said(fresh, monkeypatch, cpu_extension, broken):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied") if broken == "is_file" else RuntimeError("Could not determine home")

    monkeypatch.setattr(module, "cpu_name", lambda: "cpu")
    monkeypatch.setattr(module.Path, broken, refuse)
    if broken == "is_file":
        monkeypatch.setattr(module.Path, "mkdir", refuse)
    else:
        monkeypatch.delenv("TTSK_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.warns(UserWarning, match="constants cannot be kept .*(denied|no folder).*; set TTSK_CACHE or TTSK_MACHINE"):
        assert cpu_machine() == KNOWN
    assert fresh == [1] and module.describe().startswith("not measured yet")


def test_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TTSK_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root().is_relative_to(tmp_path) and cache_root().name == "ttskernels"
    monkeypatch.setattr(module.Path, "home", lambda: pytest.fail("not needed"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert str(cache_root()) == "/elsewhere/ttskernels"


def test_without_the_extension_nothing_is_measured(fresh, monkeypatch):
    monkeypatch.setattr(module._dispatch, "load_extension", lambda: "not built")
    assert cpu_machine() == Machine() and not fresh and "built in" in module.describe()


def test_plans_use_them_unless_a_machine_is_given(fresh, cpu_extension):
    tree = ([-1, *[0] * 8], [400, *[3] * 8], [0, *range(25, 34)], range(33), list(range(1, 9)), [402] * 8, HEADS)
    known, given = plan_from_parents(*tree), plan_from_parents(*tree, machine=KNOWN)
    assert known.stats() == given.stats() != plan_from_parents(*tree, machine=Machine()).stats()
    assert build_plan.__kwdefaults__["machine"] is None


def test_a_measurement_gives_a_machine(monkeypatch, cpu_extension):
    """One round of each real measurement; no number is expected of it, and nothing is kept."""
    monkeypatch.undo()
    monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setattr(module, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(module, "preemptions", lambda: 0)
    machine = module.measure()
    assert machine.workers == module._dispatch.library().ttsk_num_threads() and machine.item_us >= 0.1
    assert min(machine.flops_per_second, machine.bytes_per_second, machine.partial_bytes_per_second) > 0


def test_a_busy_machine_is_not_measured(fresh, monkeypatch, capsys, cpu_extension):
    from ttskernels.__main__ import main

    switches = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(module, "preemptions", lambda: next(switches))
    monkeypatch.setattr(module, "measure", lambda: module.best_seconds(lambda: None))
    assert cpu_machine() == Machine() and not machine_file().parent.exists(), "built in, and measured by a later process"
    monkeypatch.setattr("sys.argv", ["ttskernels", "machine"])
    assert main() == 1 and "nothing measured: other processes take the cores" in capsys.readouterr().err
