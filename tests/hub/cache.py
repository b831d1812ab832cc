"""huggingface_hub on the cache that the environment names.

Usage: python cache.py find|download REPOSITORIES. REPOSITORIES is JSON: a list of {"kind", "id", "commit", "files"},
files being path -> SHA-256 of the content. `download` has huggingface_hub fetch them from HF_ENDPOINT; `find` has it
find them without the network, and fails where it finds anything else or something amiss.
"""

import hashlib
import json
import os
import sys
import warnings

import huggingface_hub
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download, try_to_load_from_cache

mode, repositories = sys.argv[1], json.loads(sys.argv[2])
local = mode == "find"
cache = os.path.realpath(os.path.join(os.environ["HF_HOME"], "hub"))


def check(path, sha256):
    assert os.path.realpath(path).startswith(cache + os.sep), path
    with open(path, "rb") as file:
        found = hashlib.sha256(file.read()).hexdigest()
    assert found == sha256, (path, found, sha256)


for repository in repositories:
    where = {"repo_id": repository["id"], "repo_type": repository["kind"]}
    files, commit = repository["files"], repository["commit"]
    # By the branch and by the commit; file by file and all at once.
    for revision in (None, commit):
        for path, sha256 in files.items():
            check(hf_hub_download(filename=path, revision=revision, local_files_only=local, **where), sha256)
        folder = snapshot_download(
            revision=revision, local_files_only=local, allow_patterns=list(files), **where
        )
        assert os.path.basename(folder) == commit, folder
        for path, sha256 in files.items():
            check(os.path.join(folder, path), sha256)
    for path in files:
        assert isinstance(try_to_load_from_cache(repository["id"], path, repo_type=repository["kind"]), str), path

with warnings.catch_warnings():
    warnings.simplefilter("error")
    scanned = scan_cache_dir()
assert not scanned.warnings, scanned.warnings
found = {(repo.repo_type, repo.repo_id): repo for repo in scanned.repos}
assert set(found) == {(repository["kind"], repository["id"]) for repository in repositories}, set(found)
for repository in repositories:
    repo = found[repository["kind"], repository["id"]]
    assert repo.refs["main"].commit_hash == repository["commit"], repo.refs
    (revision,) = repo.revisions
    seen = {os.path.relpath(file.file_path, revision.snapshot_path) for file in revision.files}
    assert seen >= set(repository["files"]), (seen, repository["files"])
    assert all(file.size_on_disk == os.path.getsize(file.file_path) for file in revision.files)

counted = sum(len(repository["files"]) for repository in repositories)
print(f"huggingface_hub {huggingface_hub.__version__} on Python {sys.version.split()[0]}: {mode}, {counted} files")
