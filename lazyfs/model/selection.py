"""Which of the models of a listing to fetch now. Pure."""

from __future__ import annotations

from collections.abc import Container, Sequence

from lazyfs.model.layout import PIPELINE_INDEX, ModelLayout


def wanted_models(
    found: Sequence[ModelLayout],
    *,
    on_mount: bool,
    opened: Container[str] = (),
    whole: bool = True,
) -> tuple[ModelLayout, ...]:
    """Select the models to fetch now.

    A single model, or the one at the root, is fetched from the moment of mount. Any other model is
    fetched once one of its files is opened. A pipeline and its components are one model.

    Args:
        found: the models found so far.
        on_mount: `--prefetch-on` is `mount`.
        opened: paths of the files that were opened.
        whole: the listing is complete, so there are no further models.
    """
    models = [layout for layout in found if layout.shards]
    root = next((layout for layout in found if not layout.directory), None)
    as_one = (whole and len(models) == 1) or (root is not None and PIPELINE_INDEX in root.small)
    touched = [layout for layout in found if any(path in opened for path in layout.paths)]
    if as_one:
        return tuple(found) if on_mount or touched else ()
    return tuple(
        layout
        for layout in found
        if layout in touched or (on_mount and layout is root and layout.shards)
    )
