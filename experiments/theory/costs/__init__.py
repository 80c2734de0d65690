"""Sections 2.4 and 2.5 of the paper: operations, memory and time of NG+, K-FAC and Shampoo, layer by layer."""
