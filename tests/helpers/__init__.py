"""What several tests share: tiny models, runs and datasets, and stand-ins for what is outside."""
