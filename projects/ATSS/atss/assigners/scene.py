"""Names of version 0.2. They go with version 0.4.0."""

from ..deprecated import renamed

__getattr__ = renamed(
    __name__,
    Scene="atss.assigners.lists.Lists",
    Pairs="atss.assigners.lists.ListPairs",
    Segments="atss.assigners.segments.Segments",
    alignment="atss.assigners.pairs.alignment",
)
