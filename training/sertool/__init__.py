"""Train speech emotion recognisers small enough for ARM boards, with knowledge from large speech models."""

__version__ = "0.1.0"
