"""Writes the notices of third parties for the image, from what is installed there.

    python deploy/notices.py SITE_PACKAGES... > THIRD-PARTY-NOTICES

Every Python distribution below the given directories is listed with its version, its licence and
all licence files that it ships; several have more than one, for code that they bundle. Debian's
packages keep theirs in /usr/share/doc/PACKAGE/copyright.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, distributions
from pathlib import PurePosixPath

OURS = "lazyfs"
# Beginnings of the names of files that a licence may ask to be passed on.
LICENCE_FILES = ("licen", "copying", "notice", "authors")
RULE = "=" * 78


def licence_of(distribution: Distribution) -> str:
    """The licence in one line, from the newest field of the metadata that says it."""
    metadata = distribution.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = [
        each.rpartition(" :: ")[2]
        for each in metadata.get_all("Classifier") or []
        if each.startswith("License :: ") and each != "License :: OSI Approved"
    ]
    if classifiers:
        return ", ".join(classifiers)
    # Some put the whole text here.
    lines = (metadata.get("License") or "").strip().splitlines()
    return lines[0] if lines else "see below"


def licence_texts(distribution: Distribution) -> list[tuple[str, str]]:
    """Name and text of each licence file in the distribution's metadata directory."""
    found = []
    for path in distribution.files or []:
        beside = [part for part in PurePosixPath(path).parts if part.endswith(".dist-info")]
        if beside and path.name.lower().startswith(LICENCE_FILES):
            text = path.locate().read_text(encoding="utf-8", errors="replace")
            name = str(PurePosixPath(path)).partition(".dist-info/")[2].removeprefix("licenses/")
            found.append((name, text.strip()))
    return sorted(found)


def main(directories: list[str]) -> None:
    """Print the notices; raises SystemExit if a distribution does not ship its licence."""
    # By name: a distribution that two directories share is listed once.
    found = {each.name.lower(): each for each in distributions(path=directories)}
    found.pop(OURS, None)
    if not found:
        raise SystemExit(f"notices: no distributions below {', '.join(directories)}")
    print("lazyfs is distributed with the following packages.")
    for _, distribution in sorted(found.items()):
        texts = licence_texts(distribution)
        if not texts:
            raise SystemExit(f"notices: {distribution.name} ships no licence file: add its text")
        print(f"\n{RULE}\n{distribution.name} {distribution.version}")
        print(f"Licence: {licence_of(distribution)}")
        for name, text in texts:
            print(f"\n--- {name}\n\n{text}")


if __name__ == "__main__":
    main(sys.argv[1:])
