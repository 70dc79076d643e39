"""Analysis of a trained adapter: its curvature, and how much rank each layer needs."""
