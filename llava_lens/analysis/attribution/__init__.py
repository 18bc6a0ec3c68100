"""From the answer back to layers, heads, neurons, patches: sums over one run's cache that close."""
