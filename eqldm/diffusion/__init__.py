"""Stage 2: a UNet on an autoencoder's latents."""
