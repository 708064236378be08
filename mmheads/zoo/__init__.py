"""Tiny vision-language models, trained from scratch on generated documents."""
