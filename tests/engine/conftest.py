"""Checkpoints of a tiny policy and a tiny verifier."""

import pytest
from tiny_models import write_tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    policy, verifier = tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("verifier")
    write_tiny(policy, "llama", seed=1)
    write_tiny(verifier, "qwen2", seed=2, kind="ForTokenClassification", num_labels=2)
    return policy, verifier
