"""What is run on the demo tasks: comparisons, the flip test, the quickstart, and their plots."""
