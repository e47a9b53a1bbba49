"""What is planned of published repositories, and how they load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from simulated.load import simulate
from simulated.repositories import Repository, repositories

from lazyfs.model.directory import ModelFile
from lazyfs.model.layout import layouts
from lazyfs.model.selection import wanted_models

TABLE = list(repositories())
# What it takes to see that one of many models is loaded, and not looked at.
LOOK_S = 0.2
# When the first file is there, although others are planned beside it.
FIRST_S = {
    "IndexTeam/IndexTTS-2": 0.91,
    "Qwen/Qwen2.5-7B-Instruct": 1.20,
    "TheBloke/Llama-2-7B-Chat-GGUF": 4.45,
    "Wan-AI/Wan2.2-T2V-A14B": 0.60,
}


@pytest.mark.parametrize("repository", TABLE, ids=lambda each: each.name)
def test_the_plan_at_mount(repository: Repository) -> None:
    files = [ModelFile(path, size) for path, size in repository.sizes.items()]
    before = layouts(files)
    indexes = {path: repository.indexes[path] for each in before for path in each.index_paths}
    found = layouts(files, indexes=indexes)
    assert [why for each in found for why in (*each.problems, *each.warnings)] == []
    wanted = wanted_models(found, on_mount=True)
    assert [path for each in wanted for path in each.shards] == list(repository.plan)


@pytest.mark.parametrize("repository", TABLE, ids=lambda each: each.name)
def test_only_the_files_that_are_read_are_fetched(repository: Repository) -> None:
    model = repository.model()
    report = simulate(model, repository.loader(model))
    assert report.wasted_bytes <= 0.01 * report.needed_bytes
    assert report.twice == 0
    assert report.seconds <= 1.05 * report.ideal_s + LOOK_S
    assert report.first_s <= FIRST_S.get(repository.name, report.seconds)


def test_the_page_has_the_table() -> None:
    root = Path(__file__).parents[2]
    printed = subprocess.run(
        [sys.executable, root / "docs/make_models.py", "--print"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert (root / "docs/MODELS.md").read_text() == printed, "run: make docs"
