"""Analysis of data sets, assigners and results. Modules are imported on demand, because matplotlib
is slow."""

__all__ = ["canvases", "demo", "digits", "experiments", "pictures", "plots", "statistics"]
