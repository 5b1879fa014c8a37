"""Log-probs of sequences under a live model: batching, packing, trials, several processes."""
