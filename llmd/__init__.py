"""llmd: an open-weights language model behind the OpenAI HTTP API, in one command."""

__version__ = "0.1.0"
