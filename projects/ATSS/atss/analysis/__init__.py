"""What is asked of data, rules and results: statistics, experiments, pictures, plots."""
