"""Time, memory and error of llava_lens beside Hugging Face loops and TransformerLens: `python -m benchmarks --list`."""
