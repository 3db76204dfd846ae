"""What is asked of data, rules and results; loaded when it is named, because matplotlib is slow."""

__all__ = ["demo", "experiments", "files", "pictures", "plots", "statistics"]
