import functools

from ttskernels.engine.keys import as_int64, child_key, root_key


def path_key(seed: int, problem: str, ordinals: tuple[int, ...]) -> int:
    return functools.reduce(child_key, ordinals, root_key(seed, problem))


def test_keys_are_fixed_and_distinct():
    keys = [
        path_key(seed, problem, path)
        for seed in (0, 1)
        for problem in ("p", "q")
        for path in ((), (0,), (0, 1), (1, 0), (0, 0), (10,), (1,))
    ]
    assert len(set(keys)) == len(keys) and all(0 <= key < 1 << 64 for key in keys)
    assert path_key(0, "p", (0, 1)) == 6736107548904085130, "changing keys changes every published tree"


def test_signed_form_keeps_the_bits():
    for key in (0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        assert -(1 << 63) <= as_int64(key) < 1 << 63 and as_int64(key) % (1 << 64) == key
