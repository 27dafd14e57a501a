"""Speed against the assigned pipeline."""
