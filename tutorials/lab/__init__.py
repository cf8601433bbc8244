"""What is experiment and not library: the paper's networks, data, priors to compare, figures of one tutorial."""
