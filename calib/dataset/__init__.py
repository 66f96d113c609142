"""Algorithm 1: prompts to a LatentDataset."""
