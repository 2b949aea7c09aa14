"""What runs in the middle: who takes part, how gradients are combined, how the meta-state steps."""
