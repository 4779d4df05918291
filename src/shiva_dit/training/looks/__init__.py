"""Looks at a run while it goes on: held-out error, pictures, curves, early stop."""
