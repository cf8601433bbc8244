"""Experiments: the paper's networks, data, training recipes, priors to compare, figures of one tutorial."""
