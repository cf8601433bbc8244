"""How good and how sure predictions are, and priors side by side."""
