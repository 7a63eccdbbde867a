"""How a weight is stored: format objects on plain tensors. No model, no transformers."""
