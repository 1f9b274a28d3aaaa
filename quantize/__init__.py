"""HF (+ LoRA) to GGUF, token-id parity, quantization levels, the degradation check."""
