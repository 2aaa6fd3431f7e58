"""Models of everybody, tiny and with random weights, and what an adapter promises on each."""
