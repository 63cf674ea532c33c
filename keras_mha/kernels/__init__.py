"""Ways to compute attention. A kernel takes an `AttentionCall` and knows no layer."""
