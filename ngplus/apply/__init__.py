"""From curvature to directions (6): every layer's gradient is replaced on every step, small ones together."""
