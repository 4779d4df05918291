"""Plugins for engines that serve diffusers' pipelines."""
