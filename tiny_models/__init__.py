"""Tiny vision-language models, trained in the order in which large ones are trained."""
