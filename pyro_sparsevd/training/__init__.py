"""Training, from batches to a posterior."""
