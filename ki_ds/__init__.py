"""Knowledge inheritance for pre-trained language models, on DeepSpeed."""

__version__ = "0.2.0"
