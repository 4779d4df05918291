"""Quality for its cost: many ways to run one model, each at many budgets."""
