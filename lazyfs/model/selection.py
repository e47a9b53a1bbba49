"""Which of the models of a listing to fetch now. Pure."""

from __future__ import annotations

from collections.abc import Container, Sequence
from posixpath import basename

from lazyfs.model.filenames import is_projector
from lazyfs.model.layout import ModelLayout


def wanted_models(
    found: Sequence[ModelLayout],
    *,
    on_mount: bool,
    opened: Container[str] = (),
    whole: bool = True,
) -> tuple[ModelLayout, ...]:
    """Select the models to fetch now.

    A single model, or the one at the root, is fetched from the moment of mount. Any other model is
    fetched once a small file of it is opened, or some of its weights are read. All directories of
    a group are one model. Where a loader reads one of several models in a directory, none is
    fetched before that; and a GGUF model at the root is one of several if there are others below.

    Args:
        found: the models found so far.
        on_mount: `--prefetch-on` is `mount`.
        opened: paths of small files that were opened, and of weights that were read.
        whole: the listing is complete, so there are no further models.
    """
    groups = {layout.group for layout in found if layout.shards or layout.alternatives}
    alternatives = {layout.group for layout in found if layout.alternatives}
    touched = {layout.group for layout in found if any(path in opened for path in _own(layout))}
    if whole and len(groups) == 1 and not alternatives:
        return tuple(found) if on_mount or touched else ()
    quantised = {
        layout.group
        for layout in found
        if layout.format == "gguf" and not set(layout.shards).isdisjoint(_own(layout))
    }
    has_root = "" in groups and not ("" in quantised and len(quantised) > 1)
    wanted = touched | ({""} if on_mount and has_root else set())
    return tuple(layout for layout in found if layout.group in wanted)


def _own(layout: ModelLayout) -> Sequence[str]:
    """The files of a model, without projectors: they go with models in other directories too."""
    return [path for path in layout.paths if not is_projector(basename(path))]
