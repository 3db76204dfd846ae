"""What is asked of data, rules and results. None is loaded until it is named: matplotlib is slow."""

__all__ = ["experiments", "pictures", "plots", "statistics"]
