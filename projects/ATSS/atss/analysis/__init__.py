"""What is asked of data, rules and results; loaded when it is named, because matplotlib is slow."""

__all__ = ["experiments", "pictures", "plots", "statistics"]
