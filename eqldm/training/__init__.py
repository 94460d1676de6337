"""What every training stage shares: the run folder, the trainer, its callbacks."""
