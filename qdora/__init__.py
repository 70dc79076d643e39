"""qdora: DoRA on a frozen 4-bit base for the price of QLoRA."""

__version__ = "0.2.0"
