"""Every form in which a trained model leaves, its verification and its audit."""
