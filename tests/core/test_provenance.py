"""A report says which software made it, also where parts of it are missing."""

import subprocess

import torch

from convert.core import provenance


def test_versions_of_what_is_installed(monkeypatch):
    found = provenance.versions()
    assert found["torch"] == torch.__version__ and {"python", "transformers", "wandb"} <= found.keys()

    def missing(name):
        raise provenance.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(provenance.metadata, "version", missing)
    assert provenance.versions()["torch"] is None


def test_a_commit_is_none_without_git(monkeypatch):
    def gone(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", gone)
    assert provenance.commit() is None
