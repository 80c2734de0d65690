"""Figure 1, the theorems, the cost comparison and the errata of the paper, as experiments anyone can run."""
