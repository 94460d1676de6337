"""Stage 1: an equivariant autoencoder, fine-tuned or trained from scratch."""
