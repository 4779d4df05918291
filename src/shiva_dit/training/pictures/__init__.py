"""Captioned pictures as people have them: found, looked at, encoded once, and read in training."""
