"""Selection, soft ranks, estimators, budget and schedule: the mathematics, on torch alone."""
