"""LoRA adaptation: samples, exact NLL, one fit, the sweep over sample counts."""
