"""Analysis of data sets, assigners and results. Import modules one by one: matplotlib is slow."""

__all__ = [
    "canvases",
    "demo",
    "digits",
    "experiments",
    "figures",
    "pictures",
    "plots",
    "results",
    "statistics",
    "tide",
]
