"""Corpora: manifests, the adapters that make them, their check, and speaker-independent splits."""
