"""Model directories with an adapter folded into their weights."""
