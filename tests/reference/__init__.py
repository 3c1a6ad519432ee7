"""LLaVA-Gemma's training, written from its published recipe without raylava: the numbers that raylava reproduces."""
