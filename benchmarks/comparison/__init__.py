"""Every method on every task: the same search for a learning rate, seeds, and one table."""
