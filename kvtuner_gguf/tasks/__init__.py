"""Prompts with expected answers: what a cache does to what a model is used for."""
