"""Training an adapter: data, objective, trainer."""
