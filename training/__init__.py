"""What the training loops of train_utils are made of."""
