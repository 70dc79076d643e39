"""The layers: a frozen, possibly quantised linear map, and LoRA or DoRA on it; their products and norms."""
