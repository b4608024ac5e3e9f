"""What all experiments share: their settings, and the way through their configurations."""
