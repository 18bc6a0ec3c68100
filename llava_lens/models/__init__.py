"""Hooked models beside LLaVA, one module each."""
