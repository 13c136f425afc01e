"""Teachers: large speech encoders, or earlier runs of our own, and the embeddings they give."""
