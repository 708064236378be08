"""Which attention heads of a vision-language model fetch the evidence.

A thin module behind the notebooks: `published` reads the released head scores, `heads` holds
scores and head sets, `statistics` puts intervals on them, `figures` writes what is published.
"""

__version__ = "0.1.0"
