"""Where weights and activations live: device, host or disk."""
