"""What a trained adapter can be asked: its curvature, and how much rank each layer needs."""
