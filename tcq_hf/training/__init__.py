"""Unlabelled pictures in, a trained model out: views, negative filters, losses, the Trainer."""
